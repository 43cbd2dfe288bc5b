"""`rmft init`: what it sees in data of each format, and that what it writes runs as it is."""

import csv
import gzip
import json
import mailbox
import random
from email.message import EmailMessage

import pytest
import yaml
from test_cli import rmft

from rmft_jax import suggest
from rmft_jax.config import load_config
from rmft_jax.data.synthetic import synthetic_mail
from rmft_jax.errors import UserError
from rmft_jax.pii.detector import detect

MAILS = [item["text"] for item in synthetic_mail(60, seed=3)]


def as_message(text):
    """Return a mail of the corpus as a message."""
    headers, _, body = text.partition("\n\n")
    message = EmailMessage()
    for line in headers.splitlines():
        name, _, value = line.partition(": ")
        if name in ("From", "To", "Cc", "Subject") and name not in message:
            message[name] = value
    message.set_content(body or "nothing")
    return message


def write_data(folder, kind):
    """Write the mails in a format and return the path."""
    path = folder / f"my mail.{kind}"
    rows = [{"number": n, "kind": "x", "content": text} for n, text in enumerate(MAILS)]
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "txt":
        path.write_text("\n<|endoftext|>\n".join(MAILS))
    elif kind == "mbox":
        box = mailbox.mbox(path)
        for text in MAILS:
            box.add(as_message(text))
        box.close()
    else:
        box = mailbox.Maildir(path)
        for text in MAILS:
            box.add(as_message(text))
    return path


@pytest.mark.parametrize("kind, format", [
    ("jsonl.gz", "jsonl"), ("csv", "csv"), ("txt", "text"), ("mbox", "mbox"), ("maildir", "maildir")])  # fmt: skip
def test_configs_of_every_format_load_and_prepare_as_they_are(kind, format, tmp_path, monkeypatch, capsys):
    path = write_data(tmp_path, kind)
    monkeypatch.chdir(tmp_path)
    code, out, err = rmft("init", path.name, "--json", capsys=capsys)
    found = json.loads(out)
    assert code == 0 and err.endswith("\nwrote my_mail.yaml, which says what to do next\n")
    assert found["data"]["format"] == format and found["documents"] == found["sample"]["documents"] == 60
    if format in ("jsonl", "csv"):
        assert found["config"]["source"]["text_field"] == "content" and found["data"]["mail"]
    written = (tmp_path / "my_mail.yaml").read_text()
    assert yaml.safe_load(written) == found["config"] and "rmft train my_mail.yaml" in written
    values = {span.value for text in MAILS for span in detect(text)}
    assert not [value for value in values if value in (written + out).lower()]
    emails = found["pii"]["email"]
    assert emails["values"] <= len(values) and emails["occurrences"] > emails["values"] > 50
    code, out, err = rmft("prepare", "my_mail.yaml", "--json", capsys=capsys)
    manifest = json.loads(out)
    assert code == 0 and manifest["train"]["documents"] + manifest["heldout"]["documents"] == 60
    assert manifest["pii_identities"] > 50


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl.gz", "csv", "mbox", "maildir"])
def test_the_whole_job_runs_from_the_config_as_it_is(kind, tmp_path, monkeypatch, capsys):
    path = write_data(tmp_path, kind)
    monkeypatch.chdir(tmp_path)
    lines = ["init " + path.name.replace(" ", "~"), "prepare my_mail.yaml", "train my_mail.yaml masking.policy=none",
             "train my_mail.yaml", "audit runs/my_mail/runs/baseline runs/my_mail/runs/rmft",
             "compare runs/my_mail/runs/baseline runs/my_mail/runs/rmft", "report runs/my_mail"]  # fmt: skip
    for line in lines:
        code, _, err = rmft(*(word.replace("~", " ") for word in line.split()), capsys=capsys)
        assert code == 0, err
    assert (tmp_path / "runs/my_mail/report.html").stat().st_size > 10_000


def test_the_field_with_the_most_text_is_taken_and_mail_is_recognised(tmp_path):
    body = "a long text, and no mail: it has colons\n\nin it " * 3
    rows = [{"id": str(n) * 30, "title": "short", "body": body} for n in range(20)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    source = suggest.find_source(str(path))
    assert (source.text_field, source.mail) == ("body", False)
    mail = "Date: Mon, 1 Jan 2001\nFrom: a@x.example\nTo: b@x.example,\n c@x.example\n\nHello"
    path.write_text("\n".join(json.dumps({"raw": mail, "n": 1}) for _ in range(20)))
    source = suggest.find_source(str(path))
    assert (source.text_field, source.mail) == ("raw", True)


def test_a_model_grows_with_time_and_text_and_text_shrinks_without_time():
    texts = ["x" * 1000] * 100
    fits = [suggest._fit(texts, 100_000, budget, on_cpu=True) for budget in (1e12, 1e14, 1e16, 1e18)]
    assert [fit["limit"] > 0 for fit in fits] == [True, True, False, False]
    assert fits[0]["limit"] < fits[1]["limit"] and fits[2]["parameters"] < fits[3]["parameters"]
    for fit, budget in zip(fits[1:], (1e14, 1e16, 1e18), strict=True):
        assert fit["flops"] <= budget * 1.01
    assert suggest._fit(texts, 200, 1e18, on_cpu=True)["parameters"] < 1e6  # not more model than text


def test_parameters_are_those_of_the_model():
    from rmft_jax.models.gpt import count_params, init_params

    config = load_config(None, ["model.layers=2", "model.width=64", "model.heads=2"])
    import jax

    shapes = jax.eval_shape(lambda: init_params(config.model, 512, jax.random.key(0)))
    assert suggest._parameters(2, 64, 512) == count_params(shapes)


def test_documents_of_large_files_are_estimated(tmp_path, monkeypatch):
    lines = [json.dumps({"text": random.Random(n).randbytes(n % 90).hex()}) + "\n" for n in range(3000)]
    monkeypatch.setattr(suggest, "SAMPLE", 50)
    monkeypatch.setattr(suggest, "_HEAD", 1 << 15)
    for name, data in (("a.jsonl", "".join(lines).encode()), ("b.jsonl.gz", gzip.compress("".join(lines).encode(), 6))):
        (tmp_path / name).write_bytes(data)
        source = suggest.find_source(str(tmp_path / name))
        assert suggest._documents(source, ["x"] * 50) == pytest.approx(3000, rel=0.25)


@pytest.mark.parametrize("content, says", [
    (None, "does not exist: name a file or a folder"), (b"", "is empty"), (b"\x1f\x8b\x08\0torn", "cannot be read"),
    (b'{"n": 1}\n', "no field with text"),
    (b'[{"text": "a"}]', "is one JSON array: write an object a line"),
    (b"\x89PNG\r\n\0\0", "neither text nor a format known here"),
    (b"one document alone", "has no training documents")])  # fmt: skip
def test_bad_data_are_one_line(content, says, tmp_path, capsys):
    path = tmp_path / {0x1F: "a.jsonl.gz", ord("["): "a.json"}.get(next(iter(content or b""), 0), "a.txt")
    if content is not None:
        path.write_bytes(content)
    code, out, err = rmft("init", path, "--to", tmp_path / "c.yaml", capsys=capsys)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and not out and len(lines) == 1 and says in lines[0] and not (tmp_path / "c.yaml").exists()


def test_a_config_is_not_overwritten(tmp_path):
    (tmp_path / "c.yaml").write_text("mine")
    with pytest.raises(UserError, match="exists already: name another file with --to"):
        suggest.write_config({"yaml": "x"}, tmp_path / "c.yaml")
