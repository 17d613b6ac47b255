package acl

import (
	"cmp"
	"slices"
	"strings"
)

// ACL is what an identity may do. It never changes; any number of goroutines may
// ask it. Its zero value allows nothing.
type ACL struct {
	all   bool
	rules map[*kind]*rules
}

// All allows everything: the ACL of a management token.
var All = &ACL{all: true}

// Compile makes the ACL of a token that has the policies.
func Compile(policies ...*Policy) *ACL {
	a := &ACL{rules: map[*kind]*rules{}}
	for _, p := range policies {
		for _, ns := range p.Namespaces {
			a.add(ofNamespace, ns.Name, ns.Capabilities)
			if ns.Variables == nil {
				continue
			}
			for _, path := range ns.Variables.Paths {
				a.add(ofVariables, ns.Name+between+path.PathSpec, path.Capabilities)
			}
		}
		for k, list := range map[*kind][]*Rule{ofNodePool: p.NodePools, ofHostVolume: p.HostVolumes, ofModel: p.Models} {
			for _, rule := range list {
				a.add(k, rule.Name, rule.Capabilities)
			}
		}
		for k, l := range map[*kind]*Level{ofAgent: p.Agent, ofNode: p.Node, ofOperator: p.Operator, ofQuota: p.Quota, ofPlugin: p.Plugin} {
			if l != nil {
				a.add(k, "", k.policies[l.Policy])
			}
		}
	}
	for _, r := range a.rules {
		r.sort()
	}
	return a
}

// between stands between a namespace and a path of variables; neither can hold it.
const between = "\x00"

func (a *ACL) add(k *kind, glob string, caps []string) {
	r := a.rules[k]
	if r == nil {
		r = &rules{of: map[string]set{}}
		a.rules[k] = r
	}
	s := r.of[glob]
	for _, name := range caps {
		s |= k.bit(name)
	}
	r.of[glob] = s
}

// Allow is the decision: may the identity do c there? The place is a namespace for
// Nomad's capabilities of jobs, a namespace and a name for those of variables, a
// name alone for pools, volumes and models, and nothing for the rest.
func (a *ACL) Allow(c Capability, namespace, name string) bool {
	if a.all {
		return true
	}
	at, ok := places[c]
	if !ok {
		return false // management, and what is no capability
	}
	switch {
	case at.kind == ofNamespace:
		name = namespace
	case at.kind == ofVariables:
		name = namespace + between + name
	case at.kind.name == nil:
		name = ""
	}
	r := a.rules[at.kind]
	if r == nil {
		return false
	}
	s := r.find(name)
	return s&denied == 0 && s&at.bits != 0
}

// AllowSome says whether Allow can be true at some place: who lists such places may
// come in, and sees those only.
func (a *ACL) AllowSome(c Capability) bool {
	if a.all {
		return true
	}
	at, ok := places[c]
	if !ok {
		return false
	}
	r := a.rules[at.kind]
	if r == nil {
		return false
	}
	for _, s := range r.of {
		if s&denied == 0 && s&at.bits != 0 {
			return true
		}
	}
	return false
}

// IsManagement says whether everything is allowed.
func (a *ACL) IsManagement() bool { return a.all }

// rules are those of one kind.
type rules struct {
	of    map[string]set // by glob, or name in full
	globs []glob         // the ones with a star, the best first
}

type glob struct {
	text  string
	exact int // characters that are no star
	set   set
}

func (r *rules) sort() {
	for text, s := range r.of {
		if stars := strings.Count(text, "*"); stars > 0 {
			r.globs = append(r.globs, glob{text, len(text) - stars, s})
		}
	}
	slices.SortFunc(r.globs, func(a, b glob) int {
		return cmp.Or(cmp.Compare(b.exact, a.exact), cmp.Compare(b.text, a.text))
	})
}

// find gives the set of the rule that counts for a name.
func (r *rules) find(name string) set {
	if s, ok := r.of[name]; ok {
		return s
	}
	i := slices.IndexFunc(r.globs, func(g glob) bool { return matches(g.text, name) })
	if i < 0 {
		return 0
	}
	best := r.globs[i]
	for _, g := range r.globs[i+1:] {
		if g.exact != best.exact {
			break
		}
		if g.set&denied != 0 && matches(g.text, name) {
			return denied
		}
	}
	return best.set
}

// matches says whether a glob, in which * stands for any text, matches a name.
func matches(glob, name string) bool {
	star, from := -1, 0 // where the last star is, and where what it took ends
	g, n := 0, 0
	for n < len(name) {
		switch {
		case g < len(glob) && glob[g] == '*':
			star, from = g, n
			g++
		case g < len(glob) && glob[g] == name[n]:
			g++
			n++
		case star >= 0:
			from++
			g, n = star+1, from
		default:
			return false
		}
	}
	return strings.Trim(glob[g:], "*") == ""
}
