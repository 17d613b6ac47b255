package place

import (
	"strconv"
	"strings"
)

// version is a parsed version: numeric segments, then the dot-separated
// identifiers of a pre-release. Build metadata does not count.
type version struct {
	segments   []int64
	prerelease []string
}

// parseVersion reads "1.2.3", "v1.2", "1.2.0-beta.1+build". Strict asks for
// exactly three segments and no "v", as Semantic Versioning 2.0 does.
func parseVersion(s string, strict bool) (version, bool) {
	s = strings.TrimSpace(s)
	if !strict {
		s = strings.TrimPrefix(s, "v")
	}
	s, _, _ = strings.Cut(s, "+")
	core, pre, hasPre := strings.Cut(s, "-")
	var v version
	for _, part := range strings.Split(core, ".") {
		n, err := strconv.ParseInt(part, 10, 64)
		if err != nil || n < 0 || (strict && len(part) > 1 && part[0] == '0') {
			return version{}, false
		}
		v.segments = append(v.segments, n)
	}
	if strict && len(v.segments) != 3 {
		return version{}, false
	}
	if hasPre {
		v.prerelease = strings.Split(pre, ".")
		for _, id := range v.prerelease {
			if id == "" {
				return version{}, false
			}
		}
	}
	return v, true
}

func (v version) segment(i int) int64 {
	if i < len(v.segments) {
		return v.segments[i]
	}
	return 0
}

func compareSegments(a, b version) int {
	for i := range max(len(a.segments), len(b.segments)) {
		if c := compare(a.segment(i), b.segment(i)); c != 0 {
			return c
		}
	}
	return 0
}

// compareVersions orders by Semantic Versioning's precedence.
func compareVersions(a, b version) int {
	if c := compareSegments(a, b); c != 0 {
		return c
	}
	switch {
	case len(a.prerelease) == 0 && len(b.prerelease) == 0:
		return 0
	case len(a.prerelease) == 0:
		return 1
	case len(b.prerelease) == 0:
		return -1
	}
	for i := range min(len(a.prerelease), len(b.prerelease)) {
		if c := compareIdentifiers(a.prerelease[i], b.prerelease[i]); c != 0 {
			return c
		}
	}
	return compare(len(a.prerelease), len(b.prerelease))
}

// compareIdentifiers puts numbers below words, numbers in their order.
func compareIdentifiers(a, b string) int {
	x, errX := strconv.ParseInt(a, 10, 64)
	y, errY := strconv.ParseInt(b, 10, 64)
	switch {
	case errX == nil && errY == nil:
		return compare(x, y)
	case errX == nil:
		return -1
	case errY == nil:
		return 1
	}
	return strings.Compare(a, b)
}

// versionHolds says whether a version satisfies every part of a constraint such
// as ">= 1.2, < 2". Operand "version" knows ~> too and takes a pre-release only
// where the constraint names one of the same release; "semver" orders
// pre-releases as Semantic Versioning does.
func versionHolds(text, constraint string, semver bool) bool {
	v, ok := parseVersion(text, semver)
	if !ok {
		return false
	}
	for _, part := range strings.Split(constraint, ",") {
		part = strings.TrimSpace(part)
		op := part[:len(part)-len(strings.TrimLeft(part, "=!<>~"))]
		want, ok := parseVersion(part[len(op):], semver)
		if !ok || !versionPartHolds(v, op, want, semver) {
			return false
		}
	}
	return true
}

func versionPartHolds(v version, op string, want version, semver bool) bool {
	order := compareVersions(v, want)
	switch op {
	case "", "=":
		return order == 0
	case "!=":
		return order != 0
	}
	if !semver && len(v.prerelease) > 0 && (len(want.prerelease) == 0 || compareSegments(v, want) != 0) {
		return false
	}
	switch op {
	case "<", "<=", ">", ">=":
		return ordered(op, order)
	case "~>":
		if semver || order < 0 {
			return false
		}
		for i := range max(len(want.segments)-1, 1) { // all but the last stay
			if v.segment(i) != want.segment(i) {
				return false
			}
		}
		return true
	}
	return false
}
