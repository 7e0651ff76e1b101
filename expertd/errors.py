"""Every error that expertd raises on purpose; each message is one line that a user can act on.

    ExpertdError
    ├── ConfigError         a flag, a request or a file the user wrote is wrong       exit 2, HTTP 400
    │   └── NotFoundError   it names what is not known here, or not any more          exit 2, HTTP 404
    ├── CheckpointError     a checkpoint is missing, damaged or of an unknown kind    exit 2
    ├── BusyError           too many requests are open                                exit 1, HTTP 429
    ├── ClusterError        a rank or link process died or never came up              exit 1, HTTP 503
    └── TransportError      an exchange between ranks failed                          exit 1, HTTP 503
        ├── LocalProtocolError   we broke the contract (a bug of ours)
        ├── RemoteProtocolError  the peer broke it
        ├── LinkDown             the peer is dead or the epoch is poisoned
        └── LinkTimeout          the peer lives but did not come in time

Messages say *what*, *which*, *found and wanted*, and *what to do next*.
"""


class ExpertdError(Exception):
    """Base of all: the text is meant for the user and never holds a traceback."""

    exit_code = 1


class ConfigError(ExpertdError):
    exit_code = 2


class NotFoundError(ConfigError):
    pass


class CheckpointError(ExpertdError):
    exit_code = 2


class BusyError(ExpertdError):
    pass


class ClusterError(ExpertdError):
    pass


class TransportError(ExpertdError):
    pass


class LocalProtocolError(TransportError):
    pass


class RemoteProtocolError(TransportError):
    pass


class LinkDown(TransportError):
    pass


class LinkTimeout(TransportError):
    pass
