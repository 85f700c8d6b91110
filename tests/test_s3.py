"""Addresses of S3 work as with the `aws` command: keys, endpoints, profiles, and what fails is said."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
import pytest
from botocore.exceptions import (
    ClientError,
    ProfileNotFound,
    SSOTokenLoadError,
    UnauthorizedSSOTokenError,
)

from ray_detox import lab
from ray_detox.config import ConfigError, DataConfig
from ray_detox.data.files import check_rows, locate, peek
from ray_detox.models.s3 import advice, in_words, open_s3, split_address
from ray_detox.models.sources import local_folder
from ray_detox.runs.storage import Storage, check_storage
from ray_detox.store.dynamodb import DynamoDBStore
from ray_detox.store.errors import StoreError
from tests.emulators import emulator

LINE = json.dumps({"dialogue": "#Person1#: Did you see the match? " * 9, "summary": "s"}) + "\n"
KEYS = ("a b/c+d.jsonl", "50%25 é/x.jsonl", "what?/a#b&c=d.jsonl")


@pytest.fixture(scope="module")
def server():
    with emulator("moto") as address:
        s3 = boto3.client(
            "s3",
            endpoint_url=address,
            region_name="us-east-1",
            aws_access_key_id="a",
            aws_secret_access_key="b",
        )
        s3.create_bucket(Bucket="field")
        for key in KEYS:
            s3.put_object(Bucket="field", Key=key, Body=LINE.encode())
        for file in lab.T5.iterdir():
            s3.put_object(Bucket="field", Key=f"my model/{file.name}", Body=file.read_bytes())
        yield address


@pytest.fixture(params=["parameters", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "file"])
def suffix(request, server, tmp_path, monkeypatch):
    """The end of an address, with the server said in one of the ways."""
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    if request.param == "parameters":
        host = server.removeprefix("http://")
        return f"?endpoint_override={host}&scheme=http"
    if request.param == "file":
        (tmp_path / "config").write_text(f"[default]\nendpoint_url = {server}\n")
    else:
        monkeypatch.setenv(request.param, server)
    return ""


def test_data_models_and_storage_are_at_the_endpoint_that_aws_uses(suffix):
    for key in KEYS:
        for path in (key, key.rpartition("/")[0]):
            config = DataConfig(path=f"s3://field/{path}{suffix}")
            check_rows(locate(config), config)
            assert list(peek(locate(config), config)) == [json.loads(LINE)]

    folder = local_folder(f"s3://field/my model{suffix}", None, "policy.model")
    assert {file.name for file in folder.iterdir()} >= {"config.json", "model.safetensors"}

    address = f"s3://field/of runs{suffix}"
    check_storage(address)
    Storage(address).write("a/b c", b"kept")
    assert Storage(address).read("a/b c") == b"kept"


def test_a_question_mark_without_options_belongs_to_the_key():
    assert split_address("s3://b/what?.csv") == ("b/what?.csv", {})
    assert split_address("s3://b/a?b?region=eu-west-1") == ("b/a?b", {"region": "eu-west-1"})


def test_a_profile_without_a_sign_in_is_refused_with_the_command(tmp_path, monkeypatch):
    (tmp_path / "config").write_text(
        "[profile p]\nsso_session = s\nsso_account_id = 123456789012\nsso_role_name = r\n"
        "region = us-east-1\n[sso-session s]\nsso_region = us-east-1\n"
        "sso_start_url = https://example.com/start\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_PROFILE", "p")

    for act in (
        lambda: open_s3("s3://b/k"),
        lambda: locate(DataConfig(path="s3://b/k.jsonl")),
        lambda: local_folder("s3://b/model", None, "policy.model"),
        lambda: check_storage("s3://b/r"),
    ):
        with pytest.raises(ConfigError, match="aws sso login --profile p"):
            act()


def test_two_slashes_in_a_key_are_refused_in_a_sentence():
    with pytest.raises(ConfigError, match="an empty part between two slashes"):
        open_s3("s3://bucket//data/x.jsonl")


@pytest.mark.parametrize(
    ("settings", "endpoint", "expected"),
    [
        ("", "127.0.0.1:9000", "Invalid endpoint: 127.0.0.1:9000. Set AWS_ENDPOINT_URL"),
        ("credential_process = echo no JSON", "", "the program in credential_process"),
        ("credential_process = no-such-program", "", "the program in credential_process"),
        ("credential_process = false", "", "custom-process"),
        ("aws_access_key_id = a", "", "missing: aws_secret_access_key"),
        ("role_arn = arn:aws:iam::123456789012:role/x\nsource_profile = y", "", "does not exist"),
        ("[not closed", "", "Unable to parse config file"),
    ],
)
def test_settings_of_aws_that_cannot_be_used_are_refused_in_a_sentence(
    settings, endpoint, expected, tmp_path, monkeypatch
):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "config").write_text(f"[default]\n{settings}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    if endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)

    with pytest.raises(ConfigError) as caught:
        open_s3("s3://bucket/key")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("s3a://b/k.jsonl", "s3://BUCKET/KEY"),
        ("S3://b/k.jsonl", "s3://BUCKET/KEY"),
        ("arn:aws:s3:::b/k.jsonl", "s3://BUCKET/KEY"),
        ("https://b.s3.eu-west-1.amazonaws.com/k.jsonl", "s3://BUCKET/KEY"),
        ("https://huggingface.co/datasets/a/b", "OWNER/NAME"),
        ("hf://datasets/a/b", "OWNER/NAME"),
        ("file:///data/k.jsonl", "without file://"),
        ("gs://b/k.jsonl", "gs:// are not read"),
        ("https://example.com/k.csv", "https:// are not read"),
    ],
)
def test_addresses_of_other_kinds_are_refused_with_what_to_give(address, expected):
    with pytest.raises(ConfigError, match=expected):
        locate(DataConfig(path=address))
    with pytest.raises(ConfigError, match=expected):
        local_folder(address, None, "policy.model")


REFUSED = ClientError({"Error": {"Code": "AccessDenied"}}, "AssumeRole")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (SSOTokenLoadError(error_msg="x", profile_name="p"), "aws sso login --profile p"),
        (UnauthorizedSSOTokenError(), "aws sso login --profile p"),
        (ProfileNotFound(profile="p"), "profile 'p' does not exist"),
        (REFUSED, "AWS refused AssumeRole for the profile 'p' (AccessDenied)"),
    ],
)
def test_credentials_that_cannot_be_had_are_described(error, expected):
    assert expected in in_words(error, "p")


class Refusing(BaseHTTPRequestHandler):
    """A server of AWS that allows nobody to take a role."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        content = b"<ErrorResponse><Error><Code>AccessDenied</Code></Error></ErrorResponse>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def test_a_role_that_may_not_be_taken_is_named_for_files_and_results(tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "config").write_text(
        "[profile p]\nrole_arn = arn:aws:iam::123456789012:role/x\nsource_profile = base\n"
        "region = us-east-1\n"
        "[profile base]\naws_access_key_id = a\naws_secret_access_key = b\nregion = us-east-1\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "p")
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{server.server_port}")
        expected = r"AWS refused AssumeRole .*'p'"

        with pytest.raises(ConfigError, match=expected):
            locate(DataConfig(path="s3://b/k.jsonl"))
        with pytest.raises(StoreError, match=expected):
            DynamoDBStore("t", region="us-east-1").check()
        server.shutdown()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("AWS Error UNKNOWN (HTTP status 400): ExpiredToken", "sign in again"),
        ("AWS Error INVALID_ACCESS_KEY_ID during", "AWS_ACCESS_KEY_ID"),
        ("AWS Error ACCESS_DENIED during HeadObject", "--request-payer requester"),
        ("AWS Error ACCESS_DENIED: kms:Decrypt", "kms:GenerateDataKey"),
        ("AWS Error NETWORK_CONNECTION", "Check the address"),
        ("AWS Error NO_SUCH_BUCKET during", "Check the bucket's name"),
        ("[Errno 2] Path does not exist 'b/k/'", "`aws s3 ls`; the options of an address are"),
        ("AWS Error UNKNOWN (HTTP status 301)", "in another region"),
        ("AWS Error UNKNOWN: InvalidObjectState", "restore-object"),
        ("AWS Error UNKNOWN: RequestTimeTooSkewed", "clock"),
    ],
)
def test_errors_of_s3_are_answered_with_what_helps(text, expected):
    assert expected in advice(OSError(text))
