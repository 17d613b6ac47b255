package place

import (
	"regexp"
	"strconv"
	"strings"

	"github.com/rxvision/rxvision/cluster"
)

// These operands are judged against the job's other allocations, all others against
// the node alone.
const (
	operandDistinctHosts    = "distinct_hosts"
	operandDistinctProperty = "distinct_property"
)

// lookup resolves a constraint's target; false when the node or device has no
// such thing.
type lookup func(target string) (string, bool)

// nodeLookup resolves ${node.*}, ${attr.*} and ${meta.*} against a node; what is
// not wrapped in ${} stands for itself.
func nodeLookup(n *cluster.Node) lookup {
	return func(target string) (string, bool) {
		name, ok := interpolated(target)
		if !ok {
			return target, true
		}
		switch name {
		case "node.unique.id":
			return n.ID, true
		case "node.unique.name":
			return n.Name, true
		case "node.datacenter":
			return n.Datacenter, true
		case "node.class":
			return n.NodeClass, true
		case "node.pool":
			return n.NodePool, true
		}
		if key, ok := strings.CutPrefix(name, "attr."); ok {
			v, found := n.Attributes[key]
			return v, found
		}
		if key, ok := strings.CutPrefix(name, "meta."); ok {
			v, found := n.Meta[key]
			return v, found
		}
		return "", false
	}
}

// interpolated strips ${ } off a target that is one whole interpolation.
func interpolated(target string) (string, bool) {
	if strings.HasPrefix(target, "${") && strings.HasSuffix(target, "}") {
		return target[2 : len(target)-1], true
	}
	return "", false
}

// holds says whether two resolved targets satisfy an operand (Nomad: constraint
// block, operator). found says for each side whether its target exists.
func holds(operand, left, right string, leftFound, rightFound bool, patterns patternCache) bool {
	switch operand {
	case "is_set":
		return leftFound
	case "is_not_set":
		return !leftFound
	case "!=", "not":
		return leftFound != rightFound || left != right
	}
	if !leftFound || !rightFound {
		return false
	}
	switch operand {
	case "", "=", "==", "is":
		return left == right
	case "<", "<=", ">", ">=":
		return ordered(operand, compareText(left, right))
	case "regexp":
		re := patterns.get(right)
		return re != nil && re.MatchString(left)
	case "version":
		return versionHolds(left, right, false)
	case "semver":
		return versionHolds(left, right, true)
	case "set_contains", "set_contains_all":
		return containsAll(splitSet(left), splitSet(right))
	case "set_contains_any":
		return containsAny(splitSet(left), splitSet(right))
	}
	return false
}

// ordered turns a comparison into the answer of an ordering operand.
func ordered(operand string, order int) bool {
	switch operand {
	case "<":
		return order < 0
	case "<=":
		return order <= 0
	case ">":
		return order > 0
	}
	return order >= 0
}

// compareText orders two values as whole numbers if both are, else as decimal
// numbers if both are, else as text.
func compareText(a, b string) int {
	if x, err := strconv.ParseInt(a, 10, 64); err == nil {
		if y, err := strconv.ParseInt(b, 10, 64); err == nil {
			return compare(x, y)
		}
	}
	if x, err := strconv.ParseFloat(a, 64); err == nil {
		if y, err := strconv.ParseFloat(b, 64); err == nil {
			return compare(x, y)
		}
	}
	return strings.Compare(a, b)
}

func compare[T int | int64 | float64](a, b T) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

func splitSet(s string) []string {
	parts := strings.Split(s, ",")
	for i := range parts {
		parts[i] = strings.TrimSpace(parts[i])
	}
	return parts
}

func containsAll(have, want []string) bool {
	for _, w := range want {
		if !containsAny(have, []string{w}) {
			return false
		}
	}
	return true
}

func containsAny(have, want []string) bool {
	for _, w := range want {
		for _, h := range have {
			if h == w {
				return true
			}
		}
	}
	return false
}

// patternCache keeps compiled expressions for the life of one group's plan; a
// pattern that does not compile is kept as nil and matches nothing.
type patternCache map[string]*regexp.Regexp

func (p patternCache) get(pattern string) *regexp.Regexp {
	re, known := p[pattern]
	if !known {
		re, _ = regexp.Compile(pattern)
		p[pattern] = re
	}
	return re
}
