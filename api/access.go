package api

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/rxvision/rxvision/acl"
	"github.com/rxvision/rxvision/cluster"
)

// ACL is the settings of access control.
type ACL struct {
	// Enabled makes every request need a token, or the anonymous policy. Otherwise
	// all is allowed, and the routes of access control answer that it is disabled.
	Enabled bool
	// MinTokenTTL and MaxTokenTTL bound the life of tokens that expire; 0 means
	// Nomad's 1 minute and 24 hours.
	MinTokenTTL, MaxTokenTTL time.Duration
	// BootstrapReset gives the index that the operator has written down to allow
	// another bootstrap, 0 for none; nil when there is no such place.
	BootstrapReset func() uint64
}

const (
	defaultMinTokenTTL = time.Minute
	defaultMaxTokenTTL = 24 * time.Hour
)

var (
	errDenied  = cluster.Errorf(cluster.CodeForbidden, "Permission denied")
	errNoToken = cluster.Errorf(cluster.CodeForbidden, "ACL token not found")
)

// place is where a route's capability must be held.
type place int

const (
	nowhere      place = iota // no decision: no route may have it
	open                      // anyone may ask
	own                       // anyone with a good token, or none; the handler shows what is the caller's
	visible                   // the same; the handler shows what the caller may see
	region                    // capabilities without a place
	ofRequest                 // the request's namespace
	someplace                 // anywhere: a list, of which the handler shows what the caller may see
	ofAlloc                   // the namespace of the allocation that the path names
	ofEval                    // of the evaluation
	ofDeployment              // of the deployment
	ofPool                    // the node pool that the path names
	ofModel                   // the model
	ofArtifact                // a model of which the artifact is a version
	ofVariable                // the variable, in the request's namespace
	ofNamespace               // the namespace that the path names
	ofBody                    // the namespace of the job in the body; the handler calls allowIn
)

// access is a route's decision: at the place, all capabilities of one of the sets.
type access struct {
	at    place
	anyOf [][]acl.Capability
}

// need makes an access for which any one capability suffices.
func need(at place, anyOf ...acl.Capability) access {
	a := access{at: at}
	for _, c := range anyOf {
		a.anyOf = append(a.anyOf, []acl.Capability{c})
	}
	return a
}

// orAll adds a set of which all together suffice.
func (a access) orAll(all ...acl.Capability) access {
	a.anyOf = append(slices.Clone(a.anyOf), all)
	return a
}

// identity is who a request comes from.
type identity struct {
	token *cluster.ACLToken // nil: nobody, or access control is off
	acl   *acl.ACL
}

// may says whether the caller may do c in a namespace, or to what has the name.
func (r *request) may(c acl.Capability, namespace, name string) bool {
	return r.caller.acl.Allow(c, namespace, name)
}

// sees gives a test of namespaces for lists: those in which the caller may do c.
func (r *request) sees(c acl.Capability) func(namespace string) bool {
	if r.caller.acl.IsManagement() {
		return func(string) bool { return true }
	}
	known := map[string]bool{}
	return func(namespace string) bool {
		may, ok := known[namespace]
		if !ok {
			may = r.may(c, namespace, "")
			known[namespace] = may
		}
		return may
	}
}

// seen keeps the items in namespaces where the caller may do c.
func seen[T any](r *request, c acl.Capability, items []T, of func(T) string) []T {
	if r.caller.acl.IsManagement() {
		return items
	}
	sees := r.sees(c)
	return only(items, func(v T) bool { return sees(of(v)) })
}

// allowIn is the decision of routes with ofBody, once the body is read.
func (r *request) allowIn(namespace string) error {
	r.decided = true
	return r.allow(namespace, "")
}

// allow says whether the caller has what the route needs.
func (r *request) allow(namespace, name string) error {
	return r.satisfied(func(c acl.Capability) bool { return r.may(c, namespace, name) })
}

func (r *request) satisfied(holds func(acl.Capability) bool) error {
	for _, set := range r.access.anyOf {
		if !slices.ContainsFunc(set, func(c acl.Capability) bool { return !holds(c) }) {
			return nil
		}
	}
	return errDenied
}

// authorize finds out who the request comes from, and whether they may do what the
// route does. What is not there is judged as if it were in the request's namespace.
func (s *Server) authorize(r *request) (err error) {
	r.caller = identity{acl: acl.All}
	if !s.cfg.ACL.Enabled || r.access.at == open {
		return nil
	}
	if r.caller, err = s.identify(r); err != nil {
		return err
	}
	if r.caller.acl.IsManagement() {
		return nil
	}
	namespace := r.namespace
	switch r.access.at {
	case own, visible:
		return nil
	case region:
		return r.allow("", "")
	case ofRequest:
		return r.allow(namespace, "")
	case ofVariable:
		return r.allow(namespace, r.params["path"])
	case someplace:
		if namespace != "*" && inOneNamespace(r.access) {
			return r.allow(namespace, "")
		}
		return r.satisfied(r.caller.acl.AllowSome)
	case ofBody:
		return r.satisfied(r.caller.acl.AllowSome)
	case ofAlloc, ofEval, ofDeployment:
		if of, ok := s.namespaceOf(r.access.at, r.params["id"]); ok {
			namespace = of
		}
		return r.allow(namespace, "")
	case ofNamespace:
		return r.allow(r.params["name"], "")
	case ofPool:
		return r.allow("", r.params["pool"])
	case ofModel:
		return r.allow("", r.params["model"])
	case ofArtifact:
		return s.allowArtifact(r)
	case nowhere, open:
	}
	return fmt.Errorf("route %s has no decision", r.URL.Path)
}

// namespaceOf finds the namespace of an object by the ID in the path, in any form of
// it that handlers take. Who finds the object again, later, calls allow again.
func (s *Server) namespaceOf(at place, id string) (string, bool) {
	snap := s.cfg.Store.State().Snapshot()
	for _, id := range []string{id, hyphenate(strings.ToLower(strings.ReplaceAll(id, "-", "")))} {
		switch at {
		case ofAlloc:
			if a := snap.Alloc(nil, id); a != nil {
				return a.Namespace, true
			}
		case ofEval:
			if e := snap.Eval(nil, id); e != nil {
				return e.Namespace, true
			}
		case ofDeployment:
			if d := snap.Deployment(nil, id); d != nil {
				return d.Namespace, true
			}
		}
	}
	return "", false
}

// allowArtifact looks for a model that the caller may read and that has the
// artifact. To who may read others only, it is not there.
func (s *Server) allowArtifact(r *request) error {
	if err := r.satisfied(r.caller.acl.AllowSome); err != nil {
		return err
	}
	snap, digest := s.cfg.Store.State().Snapshot(), r.params["digest"]
	for _, m := range snap.Models(nil) {
		is := func(v *cluster.ModelVersion) bool { return v.Digest == digest }
		if r.allow("", m.Name) == nil && slices.ContainsFunc(snap.ModelVersions(nil, m.Name), is) {
			return nil
		}
	}
	return notFound("no model that you may read has the artifact %s", clip(digest))
}

// inOneNamespace says whether a list's capabilities are those of a namespace, so
// that the request may name the one it is about.
func inOneNamespace(a access) bool {
	return !strings.Contains(string(a.anyOf[0][0]), ":")
}

// identify finds the caller. A token that this server does not know may be younger
// than what it has applied; so it catches up before it says no.
func (s *Server) identify(r *request) (identity, error) {
	secret := acl.Secret(r.Header)
	if secret == "" {
		return s.holder(nil)
	}
	hash := acl.HashSecret(secret)
	token := s.cfg.Store.State().Snapshot().ACLTokenBySecret(nil, hash)
	if token == nil && !r.stale {
		if err := s.fresh(r); err != nil {
			return identity{}, err
		}
		token = s.cfg.Store.State().Snapshot().ACLTokenBySecret(nil, hash)
	}
	if token == nil || token.Expired(time.Now().UnixNano()) {
		return identity{}, errNoToken
	}
	return s.holder(token)
}

// holder gives the identity of a token's holder, of nobody for nil.
func (s *Server) holder(token *cluster.ACLToken) (identity, error) {
	names := []string{cluster.ACLAnonymousPolicy}
	switch {
	case token == nil:
	case token.Type == cluster.ACLTokenManagement:
		return identity{token, acl.All}, nil
	default:
		names = token.Policies
	}
	state := s.cfg.Store.State()
	a, err := s.compiled.get(state, policiesOf(state.Snapshot(), names))
	return identity{token, a}, err
}

// policiesOf gives the policies of the names that are there, by name.
func policiesOf(snap *cluster.Snapshot, names []string) []*cluster.ACLPolicy {
	var out []*cluster.ACLPolicy
	for _, name := range names {
		if p := snap.ACLPolicy(nil, name); p != nil {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b *cluster.ACLPolicy) int { return cmp.Compare(a.Name, b.Name) })
	return slices.CompactFunc(out, func(a, b *cluster.ACLPolicy) bool { return a.Name == b.Name })
}

// compiledACLs keeps the compiled ACLs of one state: after a restore a policy may be
// another one at the same index.
type compiledACLs struct {
	of atomic.Pointer[struct {
		state *cluster.State
		cache acl.Cache
	}]
}

func (c *compiledACLs) get(state *cluster.State, policies []*cluster.ACLPolicy) (*acl.ACL, error) {
	current := c.of.Load()
	if current == nil || current.state != state {
		current = &struct {
			state *cluster.State
			cache acl.Cache
		}{state: state}
		c.of.Store(current)
	}
	var key []byte
	for _, p := range policies {
		key = strconv.AppendUint(append(append(key, p.Name...), '@'), p.ModifyIndex, 10)
		key = append(key, ' ')
	}
	return current.cache.Get(string(key), func() (*acl.ACL, error) {
		var read []*acl.Policy
		for _, p := range policies {
			rules, err := acl.Parse(p.Rules)
			if err != nil {
				return nil, fmt.Errorf("ACL policy %s cannot be read by this version of rxvision: %w", p.Name, err)
			}
			read = append(read, rules)
		}
		return acl.Compile(read...), nil
	})
}

// mayServe refuses a job that serves models which the caller may not read, as Nomad
// does for volumes that tasks mount.
func (r *request) mayServe(j *cluster.Job) error {
	var faults []error
	for _, g := range j.TaskGroups {
		for _, t := range g.Tasks {
			if t.Model != nil && !r.may(acl.ModelRead, "", t.Model.Name) {
				faults = append(faults, cluster.Errorf(cluster.CodeForbidden, "Permission denied: task %s of group %s serves model %q, which needs %s", t.Name, g.Name, t.Model.Name, acl.ModelRead))
			}
		}
	}
	return errors.Join(faults...)
}
