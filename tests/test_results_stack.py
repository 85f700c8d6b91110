"""The results page on AWS: the template's permissions and settings, and the Lambda package."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cfnlint.decode import cfn_yaml
from moto.server import ThreadedMotoServer

from ray_detox.store.dynamodb import DynamoDBStore
from ray_detox.store.dynamodb_items import table_schema
from ray_detox.viewer.handler import SECURITY_HEADERS

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "cluster/results.yaml"
TEMPLATE = FILE.read_text(encoding="utf-8")
DEPLOY = ["bash", str(ROOT / "scripts/deploy_results.sh")]


def plain(node):
    """The template as plain values; cfn-lint's reader adds positions to them."""
    if isinstance(node, dict):
        return {str(key): plain(value) for key, value in node.items()}
    return [plain(item) for item in node] if isinstance(node, list) else node


@pytest.fixture(scope="module")
def resources():
    return plain(cfn_yaml.loads(TEMPLATE))["Resources"]


def of_type(resources, kind):
    return [resource for resource in resources.values() if resource["Type"] == kind]


def test_the_linter_finds_nothing_at_any_level():
    done = subprocess.run(
        [Path(sys.executable).with_name("cfn-lint"), "--include-checks", "I", "--", FILE],
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_the_functions_role_allows_reading_this_table_and_its_own_log(resources):
    (role,) = of_type(resources, "AWS::IAM::Role")
    (policy,) = role["Properties"]["Policies"]
    read, log = policy["PolicyDocument"]["Statement"]

    assert "ManagedPolicyArns" not in role["Properties"]
    assert read["Action"] == ["dynamodb:GetItem", "dynamodb:Query"]
    table = "arn:${AWS::Partition}:dynamodb:${AWS::Region}:${AWS::AccountId}:table/${TableName}"
    assert read["Resource"] == [{"Fn::Sub": table}, {"Fn::Sub": f"{table}/index/*"}]
    assert log["Action"] == ["logs:CreateLogStream", "logs:PutLogEvents"]
    assert log["Resource"] == {"Fn::GetAtt": ["FunctionLogs", "Arn"]}
    assert {read["Effect"], log["Effect"]} == {"Allow"}


def test_the_function_runs_a_current_python_and_ends_before_the_apis_timeout(resources):
    (function,) = of_type(resources, "AWS::Lambda::Function")
    (integration,) = of_type(resources, "AWS::ApiGatewayV2::Integration")
    has = function["Properties"]

    assert has["Architectures"] == ["arm64"]
    assert tuple(map(int, has["Runtime"].removeprefix("python").split("."))) >= (3, 13)
    assert set(has["Environment"]["Variables"]) == {"TABLE", "ORIGIN_SECRET"}
    assert 1000 * has["Timeout"] < integration["Properties"]["TimeoutInMillis"]
    assert integration["Properties"]["PayloadFormatVersion"] == "2.0"


def test_page_and_api_are_reachable_only_through_the_distribution_over_https(resources):
    (distribution,) = of_type(resources, "AWS::CloudFront::Distribution")
    config = distribution["Properties"]["DistributionConfig"]
    site, api = config["Origins"]
    (to_api,) = config["CacheBehaviors"]

    assert site["OriginAccessControlId"] == {"Fn::GetAtt": ["Oac", "Id"]}
    assert api["CustomOriginConfig"]["OriginProtocolPolicy"] == "https-only"
    assert [header["HeaderName"] for header in api["OriginCustomHeaders"]] == ["x-origin-secret"]
    assert (to_api["PathPattern"], to_api["TargetOriginId"]) == ("/api/*", "api")
    assert to_api["ViewerProtocolPolicy"] == "https-only"
    assert config["DefaultCacheBehavior"]["ViewerProtocolPolicy"] == "redirect-to-https"


def test_the_bucket_is_private_to_the_distribution(resources):
    (bucket,) = of_type(resources, "AWS::S3::Bucket")
    (policy,) = of_type(resources, "AWS::S3::BucketPolicy")
    allow, deny = policy["Properties"]["PolicyDocument"]["Statement"]

    assert set(bucket["Properties"]["PublicAccessBlockConfiguration"].values()) == {True}
    assert allow["Principal"] == {"Service": "cloudfront.amazonaws.com"}
    assert "${Distribution}" in json.dumps(allow["Condition"]["StringEquals"]["AWS:SourceArn"])
    assert set(allow["Action"]) == {"s3:GetObject", "s3:ListBucket"}
    assert deny["Effect"] == "Deny"
    assert deny["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}


def test_the_api_is_throttled_and_requires_sign_in(resources):
    (route,) = of_type(resources, "AWS::ApiGatewayV2::Route")
    (stage,) = of_type(resources, "AWS::ApiGatewayV2::Stage")
    (authorizer,) = of_type(resources, "AWS::ApiGatewayV2::Authorizer")
    parameters = plain(cfn_yaml.loads(TEMPLATE))["Parameters"]

    assert route["Properties"]["RouteKey"] == "GET /api/{proxy+}"
    assert route["Properties"]["AuthorizationType"] == {"Fn::If": ["UseAuth", "JWT", "NONE"]}
    assert authorizer["Condition"] == "UseAuth"
    assert parameters["Access"]["Default"] == "cognito"
    assert parameters["OriginSecret"]["NoEcho"] is True
    limits = stage["Properties"]["DefaultRouteSettings"]
    assert 0 < limits["ThrottlingRateLimit"] <= limits["ThrottlingBurstLimit"] <= 100


def test_an_id_token_is_not_accepted(resources):
    (route,) = of_type(resources, "AWS::ApiGatewayV2::Route")

    # API Gateway takes any valid token of the issuer for a route without scopes.
    when, scopes, otherwise = route["Properties"]["AuthorizationScopes"]["Fn::If"]
    assert when == "UseAuth"
    assert scopes == [{"Fn::If": ["UseCognito", "openid", {"Ref": "JwtScope"}]}]
    assert otherwise == {"Ref": "AWS::NoValue"}


def test_a_second_factor_is_a_switch_and_tokens_can_be_revoked(resources):
    parameters = plain(cfn_yaml.loads(TEMPLATE))["Parameters"]
    (pool,) = of_type(resources, "AWS::Cognito::UserPool")
    (reader,) = of_type(resources, "AWS::Cognito::UserPoolClient")

    assert parameters["Mfa"]["AllowedValues"] == ["OFF", "OPTIONAL", "ON"]
    assert pool["Properties"]["MfaConfiguration"] == {"Ref": "Mfa"}
    assert pool["Properties"]["EnabledMfas"]["Fn::If"][:2] == ["UseMfa", ["SOFTWARE_TOKEN_MFA"]]
    assert reader["Properties"]["EnableTokenRevocation"] is True
    assert reader["Properties"]["TokenValidityUnits"]["RefreshToken"] == "minutes"
    assert reader["Properties"]["RefreshTokenValidity"] <= 60


def test_every_log_has_a_retention_period(resources):
    logs = of_type(resources, "AWS::Logs::LogGroup")

    assert len(logs) == 2
    assert all("RetentionInDays" in group["Properties"] for group in logs)


def test_the_table_matches_the_command_lines_and_is_protected(resources):
    (table,) = of_type(resources, "AWS::DynamoDB::Table")
    made = table_schema("any")

    has = table["Properties"]
    assert table["DeletionPolicy"] == table["UpdateReplacePolicy"] == "Retain"
    assert has["DeletionProtectionEnabled"] is True
    assert has["SSESpecification"] == {"SSEEnabled": True}
    assert has["PointInTimeRecoverySpecification"] == {"PointInTimeRecoveryEnabled": True}
    assert has["TimeToLiveSpecification"] == {"AttributeName": "expires_at", "Enabled": True}
    assert has["BillingMode"] == made["BillingMode"]
    assert has["KeySchema"] == made["KeySchema"]

    def by_name(items, name):
        return sorted(items, key=lambda item: item[name])

    for part, name in (
        ("AttributeDefinitions", "AttributeName"),
        ("GlobalSecondaryIndexes", "IndexName"),
    ):
        assert by_name(has[part], name) == by_name(made[part], name)


def test_the_page_has_the_security_headers_of_the_local_server(resources):
    (policy,) = of_type(resources, "AWS::CloudFront::ResponseHeadersPolicy")
    config = policy["Properties"]["ResponseHeadersPolicyConfig"]
    csp, _ = config["SecurityHeadersConfig"]["ContentSecurityPolicy"]["ContentSecurityPolicy"][
        "Fn::Sub"
    ]
    custom = {
        item["Header"].lower(): item["Value"] for item in config["CustomHeadersConfig"]["Items"]
    }

    assert csp.replace("${SignIn}", "") == SECURITY_HEADERS["content-security-policy"]
    assert custom == {name: SECURITY_HEADERS[name] for name in custom}
    assert "permissions-policy" in custom


# ---- the package -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lambda")
    subprocess.run([*DEPLOY, "--package-only", str(folder / "a.zip")], check=True)
    subprocess.run([*DEPLOY, "--package-only", str(folder / "b.zip")], check=True)
    assert (folder / "a.zip").read_bytes() == (folder / "b.zip").read_bytes()
    with zipfile.ZipFile(folder / "a.zip") as archive:
        archive.extractall(folder / "code")
    return folder / "code"


def test_the_package_answers_from_a_table_with_only_a_lambdas_libraries(package, resources):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    environment = {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_REGION": "eu-central-1",
        "AWS_ENDPOINT_URL_DYNAMODB": address,
        "TABLE": "packed",
        "PATH": os.environ["PATH"],
    }
    (function,) = of_type(resources, "AWS::Lambda::Function")
    module, _, name = function["Properties"]["Handler"].rpartition(".")
    script = f"""
import sys
for name in ("torch", "ray", "numpy", "yaml", "pandas", "pyarrow", "transformers"):
    sys.modules[name] = None
sys.path.insert(0, {str(package)!r})
import importlib, json
module = importlib.import_module({module!r})
assert module.__file__.startswith({str(package)!r})
event = {{"rawPath": "/api/runs", "rawQueryString": "", "headers": {{}},
         "requestContext": {{"http": {{"method": "GET"}}}}}}
print(json.dumps(getattr(module, {name!r})(event, None)))
"""
    try:
        store = DynamoDBStore("packed", region="eu-central-1", endpoint_url=address)
        os.environ.setdefault("AWS_ACCESS_KEY_ID", "x")
        os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "x")
        store.create_table()
        done = subprocess.run(
            # Isolated mode: only the package and installed libraries are importable.
            [sys.executable, "-I", "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
    finally:
        server.stop()

    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["statusCode"], answer["body"]) == (200, '{"runs":[],"next":null}')


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--access", "everybody"], "--access is 'everybody'; expected cognito, jwt or public."),
        (["--access", "jwt"], "--access jwt needs --jwt-issuer and --jwt-audience."),
        (["--mfa", "maybe"], "--mfa is 'maybe'; expected off, optional or on."),
        ([], "no region; pass --region, or set AWS_REGION."),
        (["--region"], "--region needs a value; see --help."),
        (["--regoin", "x"], "unknown option --regoin; see --help."),
        (["--region", "eu-central-1"], "the aws CLI is not installed"),
    ],
)
def test_a_deployment_mistake_is_one_sentence(tmp_path, words, sentence):
    for name in ("bash", "dirname", "python3"):
        (tmp_path / name).symlink_to(shutil.which(name))

    done = subprocess.run(
        [*DEPLOY, *words], env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 2
    assert done.stderr.startswith(f"deploy_results.sh: {sentence}")
    assert re.fullmatch(r".*\n", done.stderr)


FAKE_AWS = """#!/bin/sh
printf '%s\\0' "$@" >>"$CALLS"
printf '\\n' >>"$CALLS"
case "$*" in
  *get-caller-identity*) echo 123456789012 ;;
  *head-bucket*) exit "$HEAD" ;;
  *create-bucket*) exit "$CREATE" ;;
  *"describe-stacks"*Outputs*) echo something ;;
esac
"""


@pytest.fixture
def deploy(tmp_path):
    """`deploy(head, create)`: run the script with an aws that records its calls; return both."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "aws").write_text(FAKE_AWS)
    (programs / "aws").chmod(0o755)

    def run(*words, head=0, create=0):
        calls = tmp_path / "calls"
        environment = {"CALLS": str(calls), "HEAD": str(head), "CREATE": str(create)}
        done = subprocess.run(
            [*DEPLOY, "--region", "eu-central-1", "--access", "public", *words],
            env=os.environ | environment | {"PATH": f"{programs}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        lines = calls.read_text().splitlines()
        return done, [line.split("\0")[:-1] for line in lines]

    return run


@pytest.mark.parametrize("head", [0, 254])
def test_every_use_of_a_bucket_requires_that_the_account_owns_it(deploy, head):
    done, calls = deploy(head=head)

    assert done.returncode == 0, done.stderr
    assert not [call for call in calls if call[0] == "s3"]  # these commands check no owner
    on_buckets = [call for call in calls if call[0] == "s3api" and call[1] != "create-bucket"]
    for call in on_buckets:
        assert call[call.index("--expected-bucket-owner") + 1] == "123456789012", call
    kinds = [call[1] for call in on_buckets]
    assert kinds[:4] == [
        "head-bucket",
        "put-public-access-block",
        "put-bucket-versioning",
        "put-object",
    ]
    assert (["create-bucket"] in [call[1:2] for call in calls]) == (head != 0)
    # All files of the page, with their types.
    site = ROOT / "ray_detox/viewer/static"
    sent = {call[call.index("--key") + 1] for call in on_buckets[4:]}
    kept = {"LICENSE"}
    assert sent == {"config.json"} | {
        file.relative_to(site).as_posix()
        for file in site.rglob("*")
        if file.is_file() and file.suffix.strip(".") not in kept
    }
    assert all("--content-type" in call for call in on_buckets[4:])


def test_a_bucket_of_somebody_else_ends_the_deployment_before_any_upload(deploy):
    done, calls = deploy("--code-bucket", "taken", head=254, create=254)

    assert done.returncode == 2
    assert (
        "the bucket 'taken' could not be created, or is not account 123456789012's" in done.stderr
    )
    assert [call[1] for call in calls] == ["get-caller-identity", "head-bucket", "create-bucket"]


@pytest.mark.skipif(
    "RAY_DETOX_MINISTACK" not in os.environ,
    reason="RAY_DETOX_MINISTACK is not set; scripts/test_tools.sh fetches the emulator",
)
def test_the_whole_stack_answers_on_an_emulator():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/smoke_results.py"), os.environ["RAY_DETOX_MINISTACK"]],
        capture_output=True,
        text=True,
        timeout=900,
    )

    assert done.returncode == 0, done.stdout + done.stderr
