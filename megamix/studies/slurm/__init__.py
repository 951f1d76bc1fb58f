"""Tasks as jobs of a Slurm cluster: resources, commands of Slurm, and submitting what is neither done nor queued.

    tasks, resources --submit--> sbatch slurm/SCRIPT --> megamix train, reference, prepare, ...

The job scripts in the folder ``slurm`` work without this package. It adds that a plan that cannot work is refused
before anything waits in a queue, that jobs wait for each other, and that what is done or queued is not submitted again.
"""
