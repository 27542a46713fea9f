"""The scopes of credentials. All services read the same files of keys, so a scope stands here once."""

from typing import Final

from runtime.auth import Caller

SUBMIT: Final = "jobs:submit"
READ: Final = "jobs:read"
CANCEL: Final = "jobs:cancel"
REDELIVER: Final = "jobs:redeliver"
DELETE: Final = "jobs:delete"
NOTIFY: Final = "jobs:notify"
"""To name targets in a job: the notifier calls what they name."""
STRUCTURED: Final = "jobs:structured"
"""To ask for structured output, which can slow the engine's whole batch."""
PRIORITY: Final = "jobs:priority"
"""To ask for a priority above the default, which goes before all other jobs, or for JOB_CLASS_HIGH, which has more
turns than others."""
READ_FILES: Final = "files:read"
WRITE_FILES: Final = "files:write"
DELETE_FILES: Final = "files:delete"
READ_SCHEDULES: Final = "schedules:read"
WRITE_SCHEDULES: Final = "schedules:write"
"""To create, change, run and delete schedules, whose jobs then start without a credential."""
READ_MODELS: Final = "models:read"
TRAIN: Final = "models:train"
"""To start pipelines that train a model or prepare its data set, which take a trainer for hours; to move aliases of
trained models and remove versions."""
READ_METRICS: Final = "admin:metrics"
"""To read the metrics of a service whose settings name a file of API keys for them."""
CODEC: Final = "admin:codec"
"""To have the codec server decrypt and encrypt the payloads of the credential's tenant."""
WORKERS: Final = "admin:workers"
"""To list the GPU workers, which are the installation's, whatever the credential's tenant is."""
ALL_TENANTS: Final = "admin:tenants"
"""To use another scope of admin for all tenants."""

SCOPES: Final = frozenset(
    {
        *(SUBMIT, READ, CANCEL, REDELIVER, DELETE, NOTIFY, STRUCTURED, PRIORITY, "jobs:*"),
        *(READ_FILES, WRITE_FILES, DELETE_FILES, "files:*"),
        *(READ_SCHEDULES, WRITE_SCHEDULES, "schedules:*"),
        *(READ_MODELS, TRAIN, "models:*"),
        *(READ_METRICS, CODEC, WORKERS, ALL_TENANTS, "admin:*"),
    }
)
"""All that a credential can have."""

ANONYMOUS: Final = Caller("", "", SCOPES)
"""Who calls where no authentication is configured."""
