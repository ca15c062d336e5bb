"""Which trial trains where, and the processes that do it. All that imports Ray lies here."""

import os

# before any import of Ray: no call home, plain output of our own, our own handling of Ctrl-C
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a trial that diverged or failed has no score
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: other work on the machine would starve a sweep
os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # a busy laptop
os.environ.setdefault("RAY_AUTH_MODE", "token")
