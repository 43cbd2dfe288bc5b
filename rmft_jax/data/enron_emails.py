"""The Enron mail as a TFDS data set, in ArrayRecord: `import rmft_jax.data.enron_emails` makes TFDS know it.

    tfds.builder("enron_emails").download_and_prepare()
    tfds.data_source("enron_emails", split="train")
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from rmft_jax.data.mail import read_tree

_URL = "https://www.cs.cmu.edu/~enron/enron_mail_20150507.tar.gz"
_ARCHIVE, _FOLDER = "enron_mail_20150507.tar.gz", "maildir"


class EnronEmails(tfds.core.GeneratorBasedBuilder):
    """About half a million messages of 150 mailboxes, one file each, as the CMU release of 2015 has them.

    id: where the message lies, such as lay-k/inbox/1. mailbox: whose it is. raw: the message, headers and body, as it is.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Needed without a network alone: {_ARCHIVE}, or what it unpacks to, the folder {_FOLDER}, in the manual_dir."
    )

    def __init__(self, **options):
        super().__init__(**{"file_format": "array_record"} | options)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            description="The Enron mail: real messages of 150 employees, made public by the US energy regulator.",
            homepage="https://www.cs.cmu.edu/~enron/",
            features=tfds.features.FeaturesDict({"id": text(), "mailbox": text(), "raw": text()}),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        try:
            manual = Path(dl_manager.manual_dir)
        except (AssertionError, OSError):  # there is none
            manual = Path("/nowhere")
        found = [path for path in (manual / _ARCHIVE, manual / _FOLDER) if path.exists()]
        return {"train": self._generate_examples(found[0] if found else Path(dl_manager.download(_URL)))}

    def _generate_examples(self, path: Path) -> Iterator[tuple[str, dict]]:
        for name, raw in read_tree(path):
            id = name.removeprefix(f"{_FOLDER}/")
            yield id, {"id": id, "mailbox": id.partition("/")[0], "raw": raw}
