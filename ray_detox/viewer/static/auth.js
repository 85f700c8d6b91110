// Sign-in by authorisation code with PKCE (RFC 7636), where /config.json asks for it.

const KEY = "ray-detox-sign-in";
let bearer = null;
let settings = null;

/** The access token, or null. */
export function token() {
  return bearer;
}

export function canSignIn() {
  return settings !== null;
}

/** Read the settings, and finish a sign-in that comes back with a code in the address. */
export async function startAuth() {
  settings = await readSettings();
  if (settings === null) return;
  const query = new URLSearchParams(location.search);
  const kept = recall();
  if (query.has("code") && kept?.state && query.get("state") === kept.state) {
    await exchange(query.get("code"), kept);
  } else if (kept?.bearer && kept.until > Date.now()) {
    bearer = kept.bearer;
  }
  // A code works once, and has no business in bookmarks.
  if (query.has("code") || query.has("error")) history.replaceState(null, "", `/${kept?.hash ?? ""}`);
}

/** Leave for the sign-in page; it comes back here. */
export async function signIn() {
  const verifier = random();
  const state = random();
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

/** Forget the token, here and with the provider. */
export function signOut() {
  bearer = null;
  keep(null);
  if (!settings.logout) location.reload();
  else location.assign(`${settings.logout}?${new URLSearchParams({ client_id: settings.client_id, logout_uri: `${location.origin}/` })}`);
}

async function readSettings() {
  if (document.getElementById("embedded")) return null;
  try {
    const { auth } = await (await fetch("/config.json", { cache: "no-store" })).json();
    if (!auth) return null;
    const own = (path) => (auth.domain ? `${auth.domain}/${path}` : null);
    return {
      authorize: auth.authorize ?? own("oauth2/authorize"),
      token: auth.token ?? own("oauth2/token"),
      logout: auth.logout ?? own("logout"),
      client_id: auth.client_id,
      scope: auth.scope ?? "openid",
    };
  } catch {
    return null; // the first call of the API says what is wrong
  }
}

async function exchange(code, kept) {
  try {
    const answer = await fetch(settings.token, {
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
    const { access_token: given, expires_in: seconds } = await answer.json();
    if (!answer.ok || typeof given !== "string") return;
    bearer = given;
    keep({ bearer, until: Date.now() + 1000 * (seconds ?? 3600) });
  } catch {
    // Not signed in: the page says so and offers it again.
  }
}

function random() {
  return base64url(crypto.getRandomValues(new Uint8Array(32)));
}

function base64url(bytes) {
  return btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

// For this tab only; a browser may forbid even that.
function keep(value) {
  try {
    if (value === null) sessionStorage.removeItem(KEY);
    else sessionStorage.setItem(KEY, JSON.stringify(value));
  } catch {
    // Then a reload asks to sign in again.
  }
}

function recall() {
  try {
    return JSON.parse(sessionStorage.getItem(KEY));
  } catch {
    return null;
  }
}
