"""A bucket on this machine: gcp-storage-emulator, with the conditions on generations it lacks.

python tests/bucket.py

serves gs://bucket from memory and prints its port. Checkpoints rely on conditional requests: an
object is read or replaced only if it is the one that was seen before.
"""

import io
import json
import sys
from functools import partial
from http.server import HTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage


def environment(port):
    """What programs must find in their environment to take it for Google's."""
    address = f"http://localhost:{port}"
    return {
        "STORAGE_EMULATOR_HOST": address,  # gcsfs
        "TENSORSTORE_GCS_HTTP_URL": address,
    }


class Handler(RequestHandler):
    """Answers requests on objects with their generation, and as its conditions say."""

    generation = None

    def send_response(self, code, message=None):
        super().send_response(code, message)
        if self.generation:
            self.send_header("x-goog-generation", self.generation)

    def _object(self):
        """Bucket and name of the object that is asked for or uploaded; None: none."""
        url = urlsplit(self.path)
        bucket, _, rest = url.path.partition("/b/")[2].partition("/o")
        query = parse_qs(url.query)
        names = query.get("name", [])
        if query.get("uploadType") == ["multipart"]:  # the name is in the first part
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.rfile = io.BytesIO(body)
            names = [json.loads(body.split(b"\n\n", 1)[1].split(b"\n--")[0])["name"]]
        name = unquote(rest[1:]) or (names[0] if names else None)
        return (bucket, name) if name else None

    def _conditions_fail(self):
        query, found = parse_qs(urlsplit(self.path).query), self._object()
        self.generation = None
        if not found:
            return None
        try:
            self.generation = self.storage.get_file_obj(*found)["generation"]
        except NotFound:
            pass
        now = self.generation or "0"
        if query.get("ifGenerationMatch", [now]) != [now]:
            return 412
        return 304 if query.get("ifGenerationNotMatch") == [now] else None

    def _unless_conditions_fail(self, answer):
        failed = self._conditions_fail()
        if not failed:
            answer()
            return
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(failed)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):  # noqa: N802
        self._unless_conditions_fail(super().do_GET)

    def do_POST(self):  # noqa: N802
        socket = self.rfile
        self._unless_conditions_fail(super().do_POST)
        self.rfile = socket

    def do_PATCH(self):  # noqa: N802
        self._unless_conditions_fail(super().do_PATCH)

    def do_DELETE(self):  # noqa: N802
        if self.path.startswith("/upload/"):  # an unfinished one: given up
            self.generation = None
            self.send_response(499)
            self.end_headers()
            return
        self._unless_conditions_fail(super().do_DELETE)


if __name__ == "__main__":
    storage = Storage(use_memory_fs=True)
    buckets.create_bucket("bucket", storage)
    server = HTTPServer(("localhost", 0), partial(Handler, storage))
    print(server.server_address[1])
    sys.stdout.flush()
    server.serve_forever()
