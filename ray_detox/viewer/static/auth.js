// Sign-in by authorisation code with PKCE (RFC 7636), if /config.json requires it.

const KEY = "ray-detox-sign-in";
let accessToken = null;
// Only to be revoked when the reader signs out: the page does not refresh its access token.
let refreshToken = null;
let settings = null;

/** The access token, or null if the reader has not signed in. */
export function token() {
  return accessToken;
}

export function canSignIn() {
  return settings !== null;
}

/** Read the settings; complete a sign-in if the provider redirected back with a code. */
export async function startAuth() {
  settings = await readSettings();
  if (settings === null) return;
  const query = new URLSearchParams(location.search);
  const kept = recall();
  if (query.has("code") && kept?.state && query.get("state") === kept.state) {
    await exchange(query.get("code"), kept);
  } else if (kept?.accessToken && kept.until > Date.now()) {
    accessToken = kept.accessToken;
    refreshToken = kept.refreshToken ?? null;
  }
  // Remove the one-time code from the address, so that a bookmark does not contain it.
  if (query.has("code") || query.has("error")) history.replaceState(null, "", `/${kept?.hash ?? ""}`);
}

/** Go to the provider's sign-in page, which redirects back here. */
export async function signIn() {
  const verifier = randomText();
  const state = randomText();
  keep({ verifier, state, hash: location.hash });
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(verifier));
  location.assign(
    `${settings.authorize}?${new URLSearchParams({
      response_type: "code",
      client_id: settings.client_id,
      redirect_uri: `${location.origin}/`,
      scope: settings.scope,
      state,
      code_challenge: base64url(new Uint8Array(digest)),
      code_challenge_method: "S256",
    })}`,
  );
}

/** Forget the tokens, revoke them (RFC 7009) and sign out at the provider. */
export async function signOut() {
  const revoked = refreshToken;
  accessToken = null;
  refreshToken = null;
  keep(null);
  if (revoked && settings.revoke) await revoke(revoked);
  if (!settings.logout) location.reload();
  else location.assign(`${settings.logout}?${new URLSearchParams({ client_id: settings.client_id, logout_uri: `${location.origin}/` })}`);
}

async function revoke(given) {
  try {
    // no-cors: some providers revoke without allowing other origins to read the answer, which is empty.
    await fetch(settings.revoke, {
      method: "POST",
      mode: "no-cors",
      keepalive: true,
      signal: AbortSignal.timeout(5000),
      body: new URLSearchParams({ token: given, token_type_hint: "refresh_token", client_id: settings.client_id }),
    });
  } catch {
    // The provider cannot be reached; the token ends by itself.
  }
}

async function readSettings() {
  if (document.getElementById("embedded")) return null;
  try {
    const { auth } = await (await fetch("/config.json", { cache: "no-store" })).json();
    if (!auth) return null;
    const defaultUrl = (path) => (auth.domain ? `${auth.domain}/${path}` : null);
    return {
      authorize: auth.authorize ?? defaultUrl("oauth2/authorize"),
      token: auth.token ?? defaultUrl("oauth2/token"),
      logout: auth.logout ?? defaultUrl("logout"),
      revoke: auth.revoke ?? defaultUrl("oauth2/revoke"),
      client_id: auth.client_id,
      scope: auth.scope ?? "openid",
    };
  } catch {
    return null; // the first API call shows the error
  }
}

async function exchange(code, kept) {
  try {
    const response = await fetch(settings.token, {
      method: "POST",
      headers: { "content-type": "application/x-www-form-urlencoded" },
      body: new URLSearchParams({
        grant_type: "authorization_code",
        client_id: settings.client_id,
        redirect_uri: `${location.origin}/`,
        code,
        code_verifier: kept.verifier,
      }),
    });
    const { access_token: given, refresh_token: refresh, expires_in: seconds } = await response.json();
    if (!response.ok || typeof given !== "string") return;
    accessToken = given;
    refreshToken = typeof refresh === "string" ? refresh : null;
    keep({ accessToken, refreshToken, until: Date.now() + 1000 * (seconds ?? 3600) });
  } catch {
    // The reader stays signed out; the page shows the sign-in button again.
  }
}

function randomText() {
  return base64url(crypto.getRandomValues(new Uint8Array(32)));
}

function base64url(bytes) {
  return btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

// sessionStorage keeps the value for this tab; a browser may forbid it.
function keep(value) {
  try {
    if (value === null) sessionStorage.removeItem(KEY);
    else sessionStorage.setItem(KEY, JSON.stringify(value));
  } catch {
    // Without storage, the reader has to sign in again after a reload.
  }
}

function recall() {
  try {
    return JSON.parse(sessionStorage.getItem(KEY));
  } catch {
    return null;
  }
}
