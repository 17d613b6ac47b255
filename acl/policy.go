package acl

import (
	"fmt"
	"slices"
	"strings"
)

// Fault is one thing wrong with a policy.
type Fault struct {
	Line int // from 1
	Text string
}

func (f Fault) String() string { return fmt.Sprintf("line %d: %s", f.Line, f.Text) }

// Faults is all that is wrong with a policy, by line. Only what stands behind a
// fault of syntax is not looked at.
type Faults []Fault

// Error implements error.
func (f Faults) Error() string {
	var lines []string
	for _, fault := range f {
		lines = append(lines, fault.String())
	}
	return strings.Join(lines, "\n")
}

// Rule is what one block says. Capabilities holds what Policy stands for too.
type Rule struct {
	Name         string
	Policy       string
	Capabilities []string
}

// PathRule is what a path of variables says.
type PathRule struct {
	PathSpec     string
	Capabilities []string
}

// VariablesRule is the block of variables within a namespace.
type VariablesRule struct{ Paths []*PathRule }

// NamespaceRule is what a block of a namespace says.
type NamespaceRule struct {
	Rule
	Variables *VariablesRule
}

// Level is what a block without a name says.
type Level struct{ Policy string }

// Policy is a policy as read; in JSON it has the form of Nomad's RulesJSON.
type Policy struct {
	Namespaces                           []*NamespaceRule
	NodePools, HostVolumes               []*Rule
	Models                               []*Rule `json:",omitempty"`
	Agent, Node, Operator, Quota, Plugin *Level
}

// Parse reads a policy. The error is all Faults of it.
func Parse(text string) (*Policy, error) {
	if len(text) > MaxRules {
		return nil, Faults{{1, fmt.Sprintf("the policy has %d bytes; at most %d are allowed", len(text), MaxRules)}}
	}
	items, syntax := parse(text)
	r := &reader{seen: map[*kind]int{}}
	for _, it := range items {
		r.block(it)
	}
	if syntax != nil {
		r.faults = append(r.faults, *syntax)
	}
	if r.faults != nil {
		slices.SortStableFunc(r.faults, func(a, b Fault) int { return a.Line - b.Line })
		return nil, r.faults
	}
	return &r.policy, nil
}

// reader makes a Policy of items and notes all faults.
type reader struct {
	policy Policy
	faults Faults
	seen   map[*kind]int // the line of a kind that may be there once
}

func (r *reader) fault(it *item, format string, args ...any) {
	r.faults = append(r.faults, Fault{it.line, fmt.Sprintf(format, args...)})
}

// block reads a block at the top of a policy.
func (r *reader) block(it *item) {
	i := slices.IndexFunc(blocks, func(k *kind) bool { return k.block == it.keys[0] })
	if i < 0 {
		var known []string
		for _, k := range blocks {
			known = append(known, k.block)
		}
		r.fault(it, "unknown block %q%s", clip(it.keys[0]), nearest(it.keys[0], known))
		return
	}
	k := blocks[i]
	for _, it := range r.named(k, it) {
		rule := r.rule(k, it)
		switch k {
		case ofNamespace:
			r.policy.Namespaces = append(r.policy.Namespaces, &NamespaceRule{rule, r.variables(it)})
		case ofNodePool:
			r.policy.NodePools = append(r.policy.NodePools, &rule)
		case ofHostVolume:
			r.policy.HostVolumes = append(r.policy.HostVolumes, &rule)
		case ofModel:
			r.policy.Models = append(r.policy.Models, &rule)
		default:
			r.level(k, it, rule.Policy)
		}
	}
}

func (r *reader) level(k *kind, it *item, policy string) {
	if line := r.seen[k]; line != 0 {
		r.fault(it, "block %s is there twice, first in line %d", k.block, line)
		return
	}
	r.seen[k] = it.line
	if !it.has("policy") && !it.cut {
		r.fault(it, "block %s needs a policy: %s", k.block, choice(k.policies))
	}
	l := &Level{policy}
	switch k {
	case ofAgent:
		r.policy.Agent = l
	case ofNode:
		r.policy.Node = l
	case ofOperator:
		r.policy.Operator = l
	case ofQuota:
		r.policy.Quota = l
	case ofPlugin:
		r.policy.Plugin = l
	}
}

func (it *item) has(key string) bool {
	return slices.ContainsFunc(it.body, func(in *item) bool { return in.keys[0] == key })
}

// named gives the block with its label as second key, after checking both. In JSON
// labels are the keys of an object, which may hold several.
func (r *reader) named(k *kind, it *item) []*item {
	want := 2
	if k.name == nil {
		want = 1
	}
	if it.form != '{' {
		r.fault(it, "%s must be a block: %s { … }", it.keys[0], strings.TrimSpace(k.block+" "+label(k)))
		return nil
	}
	if len(it.keys) == 1 && want == 2 && len(it.body) > 0 && !slices.ContainsFunc(it.body, func(in *item) bool { return in.form != '{' || len(in.keys) != 1 || in.keys[0] == "variables" }) {
		var out []*item
		for _, in := range it.body {
			out = append(out, r.named(k, &item{line: in.line, keys: []string{it.keys[0], in.keys[0]}, body: in.body, form: '{'})...)
		}
		return out
	}
	switch {
	case len(it.keys) != want && want == 1:
		r.fault(it, "block %s takes no name", k.block)
	case len(it.keys) != want:
		r.fault(it, `block %s takes one name: %s "…"`, k.block, k.block)
	case want == 2 && !k.name.MatchString(it.keys[1]):
		r.fault(it, "invalid name %q of block %s: it must match %s", clip(it.keys[1]), k.block, k.name)
	default:
		return []*item{it}
	}
	return nil
}

func label(k *kind) string {
	if k.name == nil {
		return ""
	}
	return `"NAME"`
}

// rule reads policy and capabilities of a block.
func (r *reader) rule(k *kind, it *item) Rule {
	var rule Rule
	if k.name != nil {
		rule.Name = it.keys[1]
	}
	var known []string
	if k.policies != nil {
		known = append(known, "policy")
	}
	if !k.coarse {
		known = append(known, "capabilities")
	}
	if k == ofNamespace {
		known = append(known, "variables")
	}
	lines := map[string]int{}
	for _, in := range it.body {
		key := in.keys[0]
		if !slices.Contains(known, key) {
			r.fault(in, "unknown attribute %q in block %s%s", clip(key), k.block, nearest(key, known))
			continue
		}
		if first := lines[key]; first != 0 {
			r.fault(in, "%s is there twice, first in line %d", key, first)
			continue
		}
		lines[key] = in.line
		switch key {
		case "policy":
			rule.Policy = r.shorthand(k, in)
		case "capabilities":
			rule.Capabilities = r.capabilities(k, in)
		}
	}
	rule.Capabilities = k.expand(rule.Policy, rule.Capabilities)
	return rule
}

// expand adds what the policy stands for and what capabilities imply; nothing
// counts beside deny.
func (k *kind) expand(policy string, caps []string) []string {
	all := append(slices.Clone(caps), k.policies[policy]...)
	if slices.Contains(all, deny) {
		return []string{deny}
	}
	var out []string
	add := func(name string) {
		if !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	for _, name := range all {
		add(name)
		for _, more := range k.implied[name] {
			add(more)
		}
	}
	return out
}

func (r *reader) shorthand(k *kind, it *item) string {
	if it.form != 's' || len(it.keys) != 1 {
		r.fault(it, "policy must be a string: %s", choice(k.policies))
		return ""
	}
	p := it.texts[0]
	if _, ok := k.policies[p]; !ok && (p != "" || k.coarse) {
		r.fault(it, "invalid policy %q of block %s: use %s", clip(p), k.block, choice(k.policies))
		return ""
	}
	return p
}

func (r *reader) capabilities(k *kind, it *item) []string {
	if it.form != '[' || len(it.keys) != 1 {
		r.fault(it, `capabilities must be a list of strings: ["%s"]`, k.caps[0])
		return nil
	}
	for _, name := range it.texts {
		if k.bit(name) == 0 {
			r.fault(it, "unknown capability %q in block %s%s", clip(name), k.block, nearest(name, append(slices.Clone(k.caps), deny)))
		}
	}
	return it.texts
}

// variables reads the block of a namespace's variables; nil when there is none.
func (r *reader) variables(ns *item) *VariablesRule {
	i := slices.IndexFunc(ns.body, func(in *item) bool { return in.keys[0] == "variables" })
	if i < 0 {
		return nil
	}
	it, out := ns.body[i], new(VariablesRule)
	if it.form != '{' || len(it.keys) != 1 {
		r.fault(it, "variables must be a block without a name: variables { … }")
		return nil
	}
	for _, in := range it.body {
		if in.keys[0] != ofVariables.block {
			r.fault(in, "unknown block %q in variables%s", clip(in.keys[0]), nearest(in.keys[0], []string{ofVariables.block}))
			continue
		}
		for _, in := range r.named(ofVariables, in) {
			rule := r.rule(ofVariables, in)
			out.Paths = append(out.Paths, &PathRule{rule.Name, rule.Capabilities})
		}
	}
	if len(it.body) == 0 && !it.cut {
		r.fault(it, `variables has no paths: path "…" { capabilities = ["read"] }`)
	}
	return out
}

// choice lists the policies that a block takes.
func choice(policies map[string][]string) string {
	var names []string
	for _, name := range []string{"list", "read", "write", "scale", deny} {
		if _, ok := policies[name]; ok {
			names = append(names, name)
		}
	}
	return strings.Join(names, ", ")
}

// nearest names the known word that is nearest to an unknown one, or all of them.
func nearest(word string, known []string) string {
	best, bestAt := "", 3
	for _, k := range known {
		if d := distance(strings.ToLower(clip(word)), k); d < bestAt {
			best, bestAt = k, d
		}
	}
	switch {
	case best != "":
		return fmt.Sprintf("; did you mean %q?", best)
	case len(known) > 12:
		slices.SortFunc(known, func(a, b string) int { return distance(clip(word), a) - distance(clip(word), b) })
		return fmt.Sprintf("; the nearest known one is %q", known[0])
	}
	return "; known are " + strings.Join(known, ", ")
}

// distance counts the single-character changes from a to b (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		last := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := last
			if a[i] != b[j] {
				change++
			}
			last, row[j+1] = row[j+1], min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
