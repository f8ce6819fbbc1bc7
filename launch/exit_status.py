"""Exit statuses after which a launcher starts a job again, since nothing is wrong with it."""

from training.loop import TERMINATED

PREEMPTED = TERMINATED  # SIGTERM; what was done is saved
PEER_LOST = 75  # another process of the job ended; EX_TEMPFAIL of sysexits.h

RESTARTABLE = (PREEMPTED, PEER_LOST)
