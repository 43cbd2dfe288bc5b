"""Google's object store as gcp-storage-emulator plays it, with two rules of the real one that it lacks and tensorstore
relies on: a read tells the generation of what it gives, and reads and writes may depend on the generation.

python store.py PORT BUCKET
"""

import sys
import time
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects


def generation(storage, bucket: str, name: str) -> str:
    """Return the generation of an object, 0 where there is none."""
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def refused(request, storage, name: str) -> HTTPStatus | None:
    """Return what the conditions of a request come to: None where they hold."""
    query, now = request.query, generation(storage, request.params["bucket_name"], name)
    if query.get("ifGenerationMatch", [now])[0] != now:
        return HTTPStatus.PRECONDITION_FAILED
    return HTTPStatus.NOT_MODIFIED if query.get("ifGenerationNotMatch", [""])[0] == now else None


def read(request, response, storage, *args, otherwise=objects.download, **more):
    """Download an object, with its generation."""
    bucket, name = request.params["bucket_name"], request.params["object_id"]
    if status := refused(request, storage, name):
        response.status = status
        return
    otherwise(request, response, storage, *args, **more)
    response["x-goog-generation"] = generation(storage, bucket, name)


def write(request, response, storage, *args, otherwise=objects.insert, **more):
    """Upload an object, if its generation is the expected one."""
    if "name" in request.query and (status := refused(request, storage, request.query["name"][0])):
        response.status = status
        return
    otherwise(request, response, storage, *args, **more)


objects.download, objects.insert = read, write

if __name__ == "__main__":
    from gcp_storage_emulator.server import create_server  # its table of routes is made when it is imported

    with create_server("localhost", int(sys.argv[1]), in_memory=True, default_bucket=sys.argv[2]):
        time.sleep(3600)
