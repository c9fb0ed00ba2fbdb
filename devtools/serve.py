"""ComfyUI with this pack, for a browser; run by `python dev.py serve`."""

from __future__ import annotations

import argparse
import sys

from .comfy_client import ServerError
from .comfy_server import ComfyServer, raise_on_terminate
from .device import add_option
from .environment import Host, SetupError


def main() -> int:
    parser = argparse.ArgumentParser(prog="dev.py serve", epilog="Other options go to ComfyUI.")
    parser.add_argument("--port", type=int, default=8188, help="default: %(default)s; 0 takes a free one")
    add_option(parser)
    args, options = parser.parse_known_args()
    raise_on_terminate()
    try:
        host = Host.from_environ()
        server = ComfyServer(host, host.base, port=args.port, device=args.device, options=tuple(options), console=True)
        with server:
            print(f"ComfyUI is at {server.url} (Ctrl-C stops it).", flush=True)
            code = server.wait()
            print(f"ComfyUI ended with code {code}.", file=sys.stderr)
            return code
    except (ServerError, SetupError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
