"""Mixing: loss sums of a step in, sampling weights of a later step out.

mixer = make_mixer({"name": "odm", "preset": "official"}, domains=["web", "code"], initial_weights=[0.7, 0.3])
weights = mixer.update(DomainStats(nats=[310.0, 95.0], tokens=[100, 40]), step=1)
"""

from megamix.mixing.mixers import DomainStats, Mixer, ScheduleConfig, make_mixer

__all__ = ["DomainStats", "Mixer", "ScheduleConfig", "make_mixer"]
