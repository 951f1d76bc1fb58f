"""``megamix launch``: runs, and chains of runs, as jobs of a Slurm cluster.

    config, resources --plan--> steps --submit--> sbatch slurm/SCRIPT --...--> megamix train, reference, prepare, ...

The job scripts are those of ``slurm/``, which do as well without this package. What it adds: a plan that cannot work is
said before anything waits in a queue, names of jobs follow from the run directory, and what is done or in the queue
already is not submitted again.
"""

from megamix.studies.slurm.chains import PrepareJob
from megamix.studies.slurm.launch import launch
from megamix.studies.slurm.placement import Resources

__all__ = ["PrepareJob", "Resources", "launch"]
