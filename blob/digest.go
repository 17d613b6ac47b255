package blob

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
)

const algorithm = "sha256"

// Digest is the SHA-256 (FIPS 180-4) of some bytes, and thereby their name. It is comparable; the zero Digest names
// nothing. As only ParseDigest, Sum, Store.Put and Store.List make others, a Digest is always safe in a path.
type Digest struct {
	sum [sha256.Size]byte
}

// ParseDigest reads "sha256:" and 64 lowercase hexadecimal digits, the form that String writes and the OCI image
// specification uses. There is one spelling per digest, so texts can be compared as well.
func ParseDigest(s string) (Digest, error) {
	name, digits, found := strings.Cut(s, ":")
	switch {
	case !found:
		return Digest{}, fmt.Errorf("digest %s has no algorithm: want %q and 64 hex digits", quote(s), algorithm+":")
	case name != algorithm:
		return Digest{}, fmt.Errorf("digest %s uses algorithm %s: only %q is supported", quote(s), quote(name), algorithm)
	case len(digits) != 2*sha256.Size:
		return Digest{}, fmt.Errorf("digest %s has %d characters after the colon: want %d hex digits", quote(s), len(digits), 2*sha256.Size)
	}
	d, ok := fromHex(digits)
	switch {
	case !ok:
		return Digest{}, fmt.Errorf("digest %s: after the colon only the digits 0-9 and a-f are allowed, in lower case", quote(s))
	case d == Digest{}:
		return Digest{}, fmt.Errorf("digest %s is all zeros, which names nothing", quote(s))
	}
	return d, nil
}

// Sum returns the digest of b.
func Sum(b []byte) Digest { return Digest{sha256.Sum256(b)} }

// String returns the form that ParseDigest reads.
func (d Digest) String() string { return algorithm + ":" + d.Hex() }

// Hex returns the 64 lowercase hexadecimal digits alone.
func (d Digest) Hex() string { return hex.EncodeToString(d.sum[:]) }

// fromHex reads 64 lowercase digits; ok is false for anything else.
func fromHex(s string) (d Digest, ok bool) {
	if len(s) != 2*sha256.Size || s != strings.ToLower(s) {
		return Digest{}, false
	}
	_, err := hex.Decode(d.sum[:], []byte(s))
	return d, err == nil
}

// quote shows s in an error without letting a huge input fill the message.
func quote(s string) string {
	const most = 100
	if len(s) > most {
		return fmt.Sprintf("%q…", s[:most])
	}
	return fmt.Sprintf("%q", s)
}
