"""Exit statuses after which a launcher starts a job again, since nothing is wrong with it."""

from models.distributed import PEER_LOST
from training.loop import TERMINATED

PREEMPTED = TERMINATED  # SIGTERM; what was done is saved

RESTARTABLE = (PREEMPTED, PEER_LOST)
