package blob

import (
	"strings"
	"testing"
)

// The FIPS 180-4 example "abc".
const abcDigest = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

func TestSum(t *testing.T) {
	if got := Sum([]byte("abc")).String(); got != abcDigest {
		t.Errorf("Sum(abc) = %s, want %s", got, abcDigest)
	}
}

func TestParseDigest(t *testing.T) {
	digits := abcDigest[len("sha256:"):]
	for _, test := range []struct{ in, complaint string }{
		{abcDigest, ""},
		{"", `has no algorithm`},
		{digits, `has no algorithm`},
		{"md5:" + digits, `only "sha256" is supported`},
		{"SHA256:" + digits, `only "sha256" is supported`},
		{"sha256:" + digits[1:], `63 characters`},
		{"sha256:" + digits + "0", `65 characters`},
		{"sha256:" + strings.ToUpper(digits), `in lower case`},
		{"sha256:" + digits[:63] + "g", `0-9 and a-f`},
		{"sha256:" + digits[:61] + "/..", `0-9 and a-f`},
		{" " + abcDigest, `only "sha256" is supported`},
		{abcDigest + "\n", `65 characters`},
		{"sha256:" + strings.Repeat("0", 64), `all zeros`},
		{strings.Repeat("x", 1<<20), `…`},
	} {
		d, err := ParseDigest(test.in)
		switch {
		case test.complaint == "" && (err != nil || d.String() != test.in):
			t.Errorf("ParseDigest(%q) = %s, %v", test.in, d, err)
		case test.complaint != "" && (err == nil || !strings.Contains(err.Error(), test.complaint)):
			t.Errorf("ParseDigest(%.100q): error %v, want one about %q", test.in, err, test.complaint)
		case err != nil && (d != Digest{} || len(err.Error()) > 500):
			t.Errorf("ParseDigest(%.100q): digest %s and an error of %d bytes", test.in, d, len(err.Error()))
		}
	}
}

func FuzzParseDigest(f *testing.F) {
	f.Add(abcDigest)
	f.Add("sha256:")
	f.Add("sha256:../../../../etc/passwd")
	f.Fuzz(func(t *testing.T, s string) {
		d, err := ParseDigest(s)
		if err != nil {
			if (d != Digest{}) {
				t.Fatalf("ParseDigest(%q) failed but returned %s", s, d)
			}
			return
		}
		if d.String() != s {
			t.Fatalf("ParseDigest(%q).String() = %q: two spellings of one digest", s, d)
		}
		if strings.ContainsAny(d.Hex(), `/\.`) || len(d.Hex()) != 64 {
			t.Fatalf("%q is no safe file name", d.Hex())
		}
	})
}
