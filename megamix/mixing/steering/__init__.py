"""Steering: commands of people, given while a run goes on, that act on the weights its rule asks for.

    steering.jsonl --(rank 0's mixing thread)--> course --> constraints --> weights, from a stated position
    steered.jsonl <-- the step and position of each command's effect, before any rank is told

`command` is a line of the journal, `journal` the two files, `course` what is in force and how a command changes it, and
`steering` applies them to a run's weights.
"""
