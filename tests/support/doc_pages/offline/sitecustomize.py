"""Python as on a machine without a network and without files beside the checkout.

On the path of every process that runs a block of the documentation.
"""

import os
import sys

_SHARED = tuple(os.environ["DOCS_OUT_OF_REACH"].split(os.pathsep))
_LOOPBACK = ("127.0.0.1", "::1", "localhost", "")


def _hook(event, arguments):
    if event == "open":
        path = arguments[0]
        if isinstance(path, str | bytes) and "shared" in os.fsdecode(path):
            whole = os.path.realpath(os.fsdecode(path))
            if whole.startswith(_SHARED):
                raise PermissionError(f"the documentation reads {whole}, which no user has")
    elif event == "socket.connect":
        address = arguments[1]
        if isinstance(address, tuple) and address[0] not in _LOOPBACK:
            raise PermissionError(f"the documentation connects to {address}")


sys.addaudithook(_hook)
