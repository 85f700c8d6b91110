"""Deploy cluster/results.yaml to an emulator of AWS, and read results through it.

    python scripts/smoke_results.py path/to/ministack

The emulator is ministack (scripts/test_tools.sh installs it). It runs the code of the Lambda function
behind an HTTP API with sign-in, against its own DynamoDB. If the aws CLI is installed,
deploy_results.sh deploys as well.
"""

import base64
import hashlib
import http.client
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import boto3

from ray_detox.store.dynamodb import DynamoDBStore

ROOT = Path(__file__).resolve().parents[1]
REGION = "us-east-1"
SECRET = "s" * 32
SAMPLE = {"index": 0, "query": "q", "toxicity_before": 0.9, "toxicity_after": 0.1}
REPORT = {
    "run_id": "smoke",
    "recipe": "lab",
    "status": "complete",
    "created": "2026-01-31T12:00:00+00:00",
    "n": 1,
    "verdict": {"name": "improved"},
    "toxicity": {"toxic_above": 0.5},
}


@contextmanager
def emulator(program: str) -> Iterator[str]:
    """Run ministack on a free port with a temporary folder, and yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    settings = {"GATEWAY_PORT": str(port), "BIND_HOST": "127.0.0.1", "IOT_MTLS_ENABLED": "0"}
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/log", "wb") as log:
        process = subprocess.Popen(
            [program], cwd=folder, env=os.environ | settings, stdout=log, stderr=log
        )
        try:
            for _ in range(150):
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.1)
            else:
                sys.exit(f"{program} did not answer at {address} within 15 seconds.")
            yield address
        finally:
            process.terminate()
            process.wait(20)


def client(name: str, address: str) -> Any:
    """Return a boto3 client for the emulator."""
    return boto3.client(name, endpoint_url=address, region_name=REGION)


def deploy(address: str, access: str) -> dict[str, str]:
    """Deploy the stack, with one table for all kinds of access, and return its outputs."""
    s3, stacks = client("s3", address), client("cloudformation", address)
    with tempfile.TemporaryDirectory() as folder:
        zip_file = f"{folder}/lambda.zip"
        command = ["bash", str(ROOT / "scripts/deploy_results.sh"), "--package-only", zip_file]
        subprocess.run(command, check=True)
        s3.create_bucket(Bucket="code")
        s3.upload_file(zip_file, "code", "lambda.zip")
    parameters = {
        "Access": access,
        "CodeBucket": "code",
        "CodeKey": "lambda.zip",
        "OriginSecret": SECRET,
        "TableName": f"results-{access}",
    }
    name = f"smoke-{access}"
    stacks.create_stack(
        StackName=name,
        TemplateBody=(ROOT / "cluster/results.yaml").read_text(encoding="utf-8"),
        Capabilities=["CAPABILITY_IAM"],
        Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in parameters.items()],
    )
    stacks.get_waiter("stack_create_complete").wait(StackName=name, WaiterConfig={"Delay": 1})
    (stack,) = stacks.describe_stacks(StackName=name)["Stacks"]
    return {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}


def ask(address: str, api: str, path: str, **headers: str) -> tuple[int, Any, float]:
    """Send a request to the stack's API; return status, body and seconds."""
    port = address.rpartition(":")[2]
    request = urllib.request.Request(address + path, headers=headers)
    # The emulator distinguishes its APIs by host name.
    request.add_header("Host", f"{api}.execute-api.localhost:{port}")
    start = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read()), time.monotonic() - start
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), time.monotonic() - start


def sign_in(address: str, stack: dict[str, str]) -> dict[str, str]:
    """Create a reader, sign in as the page does, and return the tokens."""
    users = client("cognito-idp", address)
    name, password = "reader@example.com", "Correct-horse-1-battery"
    pool = {"UserPoolId": stack["UserPoolId"]}
    users.admin_create_user(**pool, Username=name, TemporaryPassword=password)
    users.admin_set_user_password(**pool, Username=name, Password=password, Permanent=True)
    found = users.describe_user_pool_client(**pool, ClientId=stack["SignInClient"])
    verifier = secrets.token_urlsafe(48)
    digest = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest())
    page = {
        "client_id": stack["SignInClient"],
        "redirect_uri": found["UserPoolClient"]["CallbackURLs"][0],
    }
    challenge = {
        "response_type": "code",
        "scope": "openid",
        "code_challenge": digest.rstrip(b"=").decode(),
        "code_challenge_method": "S256",
    }
    back = post(address, "/login", page | challenge | {"username": name, "password": password})
    (code,) = parse_qs(urlsplit(back.headers["location"]).query)["code"]
    grant = {"grant_type": "authorization_code", "code": code, "code_verifier": verifier}
    tokens: dict[str, str] = json.loads(post(address, "/oauth2/token", page | grant).read())
    return tokens


def post(address: str, path: str, form: dict[str, str]) -> http.client.HTTPResponse:
    """Send a form without following a redirection."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    kind = {"content-type": "application/x-www-form-urlencoded"}
    connection.request("POST", path, urlencode(form), kind)
    return connection.getresponse()


def deploy_by_script(address: str) -> str:
    """Run deploy_results.sh against the emulator, and return its output."""
    settings = {"AWS_ENDPOINT_URL": address, "AWS_REGION": REGION}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/deploy_results.sh"), "--stack", "by-script"],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        sys.exit(f"deploy_results.sh failed: {done.stderr or done.stdout}")
    return done.stdout


def main(program: str) -> None:
    """Deploy with and without sign-in, and check the answers of both."""
    failed: list[str] = []
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}

    def check(what: str, found: object, expected: object) -> None:
        right = found == expected
        print(f"{'ok  ' if right else 'FAIL'} {what}: {found}")
        if not right:
            failed.append(what)

    with emulator(program) as address:
        start = time.monotonic()
        closed = deploy(address, "cognito")
        print(f"     deployed with sign-in in {time.monotonic() - start:.1f} s")
        opened = deploy(address, "public")
        for access in ("cognito", "public"):
            store = DynamoDBStore(f"results-{access}", region=REGION, endpoint_url=address)
            store.put_run(REPORT, [SAMPLE])
            store.close()
        status, _, _ = ask(address, closed["ApiId"], "/api/runs")
        check("with sign-in, without a token", status, 401)
        status, _, _ = ask(address, closed["ApiId"], "/api/runs", Authorization="Bearer forged")
        check("with sign-in, with a forged token", status, 401)
        tokens = sign_in(address, closed)
        check("sign-in, tokens for the page", {"refresh_token", "id_token"} <= tokens.keys(), True)
        headers = {"Authorization": f"Bearer {tokens['id_token']}", "x-origin-secret": SECRET}
        status, _, _ = ask(address, closed["ApiId"], "/api/runs/smoke", **headers)
        check("with sign-in, with an ID token", status, 403)
        headers["Authorization"] = f"Bearer {tokens['access_token']}"
        status, body, _ = ask(address, closed["ApiId"], "/api/runs/smoke", **headers)
        check("with sign-in, with a reader's token", (status, body), (200, REPORT))

        own = {"x-origin-secret": SECRET}
        status, body, seconds = ask(address, opened["ApiId"], "/api/runs", **own)
        check(
            f"public, the runs ({seconds:.2f} s)",
            (status, [r["run_id"] for r in body["runs"]]),
            (200, ["smoke"]),
        )
        path = "/api/runs/smoke/samples?sort=toxicity"
        status, body, seconds = ask(address, opened["ApiId"], path, **own)
        found = [sample["toxicity_diff"] for sample in body["samples"]]
        check(
            f"public, samples by difference ({seconds:.2f} s)", (status, found), (200, [0.1 - 0.9])
        )
        status, _, _ = ask(address, opened["ApiId"], "/api/runs/none", **own)
        check("public, a missing run", status, 404)
        status, _, _ = ask(address, opened["ApiId"], "/other", **own)
        check("public, another route", status, 404)
        status, _, _ = ask(address, opened["ApiId"], "/api/runs")
        check("public, not through CloudFront", status, 403)

        if shutil.which("aws"):
            said = deploy_by_script(address)
            check(
                "deploy_results.sh prints the address of the page",
                "The page is at https://" in said,
                True,
            )
            s3 = client("s3", address)
            buckets = [b["Name"] for b in s3.list_buckets()["Buckets"]]
            (site,) = [b for b in buckets if "sitebucket" in b.lower() and "script" in b.lower()]
            page = s3.head_object(Bucket=site, Key="index.html")
            check("its page", page["ContentType"], "text/html; charset=utf-8")
            config = json.loads(s3.get_object(Bucket=site, Key="config.json")["Body"].read())
            check("its sign-in", sorted(config["auth"]), ["client_id", "domain"])
        else:
            print("     deploy_results.sh itself was not run: the aws CLI is not installed")
    if failed:
        sys.exit(f"Not as expected: {', '.join(failed)}.")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
