#!/usr/bin/env bash
# Deploy the results page to AWS, or update it.
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: bash scripts/deploy_results.sh [--region REGION] [OPTIONS]

Deploys cluster/results.yaml (table, read-only API and page), then prints the address of the page.
Run it again to update; stored results stay. Needs python3 and the aws CLI, signed in.

  --region REGION        AWS region; default AWS_REGION or AWS_DEFAULT_REGION
  --stack NAME           default ray-detox-results
  --table NAME           default ray-detox, as results.table
  --existing-table       the table exists (ray-detox table create)
  --access HOW           cognito (default): users that you add
                         jwt: users of another issuer, with --jwt-issuer URL --jwt-audience ID
                         (and --jwt-scope SCOPE, which its access tokens have; default openid)
                         public: anybody who knows the address
  --code-bucket NAME     bucket for the code, created if necessary; default ray-detox-code-ACCOUNT-REGION
  --mfa HOW              off (default), optional or on: a second factor, with cognito
  --package-only FILE    only write the zip file of the Lambda function

Deleting the stack (aws cloudformation delete-stack) keeps the table and the bucket of the page.
USAGE
}

die() {
  printf 'deploy_results.sh: %s\n' "$*" >&2
  exit 2
}

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
region=${AWS_REGION:-${AWS_DEFAULT_REGION:-}}
stack=ray-detox-results table=ray-detox create=true access=cognito issuer="" audience="" scope=openid mfa=off
package="" code=""
while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit
      ;;
    --existing-table) create=false ;;
    --region | --stack | --table | --access | --jwt-issuer | --jwt-audience | --jwt-scope | --mfa | \
      --code-bucket | --package-only)
      (($# > 1)) || die "$1 needs a value; see --help."
      case $1 in
        --region) region=$2 ;;
        --stack) stack=$2 ;;
        --table) table=$2 ;;
        --access) access=$2 ;;
        --jwt-issuer) issuer=$2 ;;
        --jwt-audience) audience=$2 ;;
        --jwt-scope) scope=$2 ;;
        --mfa) mfa=$2 ;;
        --code-bucket) code=$2 ;;
        --package-only) package=$2 ;;
      esac
      shift
      ;;
    *) die "unknown option $1; see --help." ;;
  esac
  shift
done

# make_zip FILE: write the files that the Lambda function needs; equal files give equal bytes.
make_zip() {
  python3 - "$root" "$1" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

root, target = Path(sys.argv[1]), sys.argv[2]
files = [root / f"ray_detox/{name}.py" for name in ("__init__", "addresses", "bounded", "errors")]
files += sorted((root / "ray_detox/store").glob("*.py"))
files += sorted((root / "ray_detox/viewer").glob("*.py"))
with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
    for file in files:
        entry = zipfile.ZipInfo(file.relative_to(root).as_posix())  # without a date, which would change the bytes
        entry.external_attr = 0o644 << 16
        archive.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)
PYTHON
}

if [[ -n $package ]]; then
  make_zip "$package"
  exit
fi

case $access in
  cognito | public) ;;
  jwt) [[ -n $issuer && -n $audience ]] || die "--access jwt needs --jwt-issuer and --jwt-audience." ;;
  *) die "--access is '$access'; expected cognito, jwt or public." ;;
esac
case $mfa in
  off | optional | on) ;;
  *) die "--mfa is '$mfa'; expected off, optional or on." ;;
esac
[[ -n $region ]] || die "no region; pass --region, or set AWS_REGION."
command -v aws >/dev/null || die "the aws CLI is not installed; see https://aws.amazon.com/cli/."
export AWS_DEFAULT_REGION=$region AWS_REGION=$region AWS_PAGER=""
account=$(aws sts get-caller-identity --query Account --output text 2>/dev/null) ||
  die "AWS refused the credentials; sign in (aws configure, or aws sso login)."

work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT
make_zip "$work/lambda.zip"
key=results/$(python3 -c 'import hashlib,sys; print(hashlib.sha256(open(sys.argv[1],"rb").read()).hexdigest()[:16])' "$work/lambda.zip").zip
code=${code:-ray-detox-code-$account-$region}
# Names of buckets are global, and this one can be guessed: somebody else may have taken it, and could
# replace the code before it is deployed. With this argument S3 refuses a bucket of another account.
owned=(--expected-bucket-owner "$account")
if ! aws s3api head-bucket --bucket "$code" "${owned[@]}" >/dev/null 2>&1; then
  where=()
  [[ $region == us-east-1 ]] || where=(--create-bucket-configuration "LocationConstraint=$region")
  aws s3api create-bucket --bucket "$code" ${where[@]+"${where[@]}"} >/dev/null ||
    die "the bucket '$code' could not be created, or is not account $account's; choose another name with --code-bucket."
fi
aws s3api put-public-access-block --bucket "$code" "${owned[@]}" --public-access-block-configuration \
  BlockPublicAcls=true,IgnorePublicAcls=true,BlockPublicPolicy=true,RestrictPublicBuckets=true
# Versions keep what the Lambda function was deployed from, if somebody overwrites it.
aws s3api put-bucket-versioning --bucket "$code" "${owned[@]}" --versioning-configuration Status=Enabled

# upload BUCKET KEY FILE [OPTIONS]. `aws s3 cp` does not check the owner.
upload() {
  aws s3api put-object --bucket "$1" --key "$2" --body "$3" "${owned[@]}" "${@:4}" >/dev/null
}
upload "$code" "$key" "$work/lambda.zip"

output() {
  aws cloudformation describe-stacks --stack-name "$stack" --output text \
    --query "Stacks[0].Outputs[?OutputKey=='$1'].OutputValue | [0]"
}

# discover ISSUER CLIENT SCOPE FILE: write the sign-in settings of the page; print the origin of its token.
discover() {
  python3 - "$@" <<'PYTHON'
import json
import sys
import urllib.parse
import urllib.request

issuer, client, scope, target = sys.argv[1:]
address = issuer.rstrip("/") + "/.well-known/openid-configuration"
with urllib.request.urlopen(address, timeout=20) as answer:
    found = json.load(answer)
auth = {
    "authorize": found["authorization_endpoint"],
    "token": found["token_endpoint"],
    "logout": found.get("end_session_endpoint"),
    "revoke": found.get("revocation_endpoint"),
    "client_id": client,
    "scope": scope if scope == "openid" else f"openid {scope}",
}
with open(target, "w", encoding="utf-8") as file:
    json.dump({"auth": auth}, file)
print("https://" + urllib.parse.urlsplit(auth["token"]).netloc)
PYTHON
}

sign_in=""
if [[ $access == jwt ]]; then
  sign_in=$(discover "$issuer" "$audience" "$scope" "$work/config.json" 2>/dev/null) ||
    die "$issuer/.well-known/openid-configuration cannot be read; check --jwt-issuer."
fi

echo "deploying $stack to $region (some minutes the first time, for CloudFront)"
parameters=(TableName="$table" CreateTable="$create" Access="$access" CodeBucket="$code" CodeKey="$key"
  JwtIssuer="$issuer" JwtAudience="$audience" JwtScope="$scope" SignInOrigin="$sign_in" Mfa="${mfa^^}")
# An existing stack keeps its secret: CloudFormation reuses the value of a parameter that is not passed.
if ! aws cloudformation describe-stacks --stack-name "$stack" >/dev/null 2>&1; then
  parameters+=(OriginSecret="$(python3 -c 'import secrets; print(secrets.token_hex(32))')")
fi
aws cloudformation deploy --stack-name "$stack" --template-file "$root/cluster/results.yaml" \
  --capabilities CAPABILITY_IAM --no-fail-on-empty-changeset --parameter-overrides "${parameters[@]}"

bucket=$(output Bucket) url=$(output Url)
if [[ $access == cognito ]]; then
  printf '{"auth": {"domain": "%s", "client_id": "%s"}}\n' \
    "$(output SignInDomain)" "$(output SignInClient)" >"$work/config.json"
elif [[ $access == public ]]; then
  echo '{"auth": null}' >"$work/config.json"
fi
site=$root/ray_detox/viewer/static
# no-cache makes browsers ask each time whether a file changed, so the page never mixes old and new modules.
fresh=(--cache-control no-cache --content-type)
for kind in js:text/javascript css:text/css html:text/html svg:image/svg+xml json:application/json; do
  find "$site" -type f -name "*.${kind%%:*}" -print0 | while IFS= read -r -d '' file; do
    upload "$bucket" "${file#"$site"/}" "$file" "${fresh[@]}" "${kind#*:}; charset=utf-8"
  done
done
upload "$bucket" config.json "$work/config.json" "${fresh[@]}" application/json
aws cloudfront create-invalidation --distribution-id "$(output DistributionId)" --paths '/*' >/dev/null

echo "The page is at $url"
echo "Store runs there with: results.store=dynamodb results.table=$table results.region=$region"
if [[ $access == cognito ]]; then
  echo "Add a reader with: aws cognito-idp admin-create-user --region $region" \
    "--user-pool-id $(output UserPoolId) --username SOMEBODY@EXAMPLE.COM"
fi
