package acl

import (
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"strings"
)

// Secret gives the secret of the token that a request carries: X-Nomad-Token, else
// Authorization with the scheme Bearer; "" when there is none.
func Secret(h http.Header) string {
	if v := h.Get("X-Nomad-Token"); v != "" {
		return v
	}
	scheme, v, _ := strings.Cut(h.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	return strings.TrimSpace(v)
}

// HashSecret gives the form in which a token's secret is kept and looked up: its
// SHA-256 in hex. Secrets are random UUIDs, so nothing slower is needed, and a
// look-up by hash tells nothing by its time.
func HashSecret(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}
