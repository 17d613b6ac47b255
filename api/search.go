package api

import (
	"slices"
	"strings"

	"github.com/rxvision/rxvision/acl"
	"github.com/rxvision/rxvision/cluster"
)

// maxMatches bounds the matches of one context in a search.
const maxMatches = 20

// contexts are the kinds of objects that a search knows, as Nomad names them; each
// finds what the caller may see. Those without a finder cannot exist in this version.
var contexts = []struct {
	name string
	find func(r *request, snap *cluster.Snapshot, prefix string) []string
}{
	{"allocs", func(r *request, snap *cluster.Snapshot, prefix string) []string {
		sees := r.sees(acl.ReadJob)
		return ids(prefix, func(p string) []*cluster.Allocation { return snap.Allocs(nil, p) },
			func(a *cluster.Allocation) (string, bool) {
				return a.ID, within(r.namespace, a.Namespace) && sees(a.Namespace)
			})
	}},
	{"jobs", func(r *request, snap *cluster.Snapshot, prefix string) []string {
		sees := r.sees(acl.ListJobs)
		var out []string
		for _, j := range snap.Jobs(nil, r.namespace, prefix) {
			if sees(j.Namespace) {
				out = append(out, j.ID)
			}
		}
		return out
	}},
	{"nodes", func(r *request, snap *cluster.Snapshot, prefix string) []string {
		if !r.may(acl.NodeRead, "", "") {
			return nil
		}
		return ids(prefix, func(p string) []*cluster.Node { return snap.Nodes(nil, p) },
			func(n *cluster.Node) (string, bool) { return n.ID, true })
	}},
	{"node_pools", func(r *request, snap *cluster.Snapshot, prefix string) []string {
		var out []string
		for _, p := range pools(snap.Nodes(nil, "")) {
			if hasPrefix(p.Name, prefix) && r.may(acl.NodePoolRead, "", p.Name) {
				out = append(out, p.Name)
			}
		}
		return out
	}},
	{"evals", func(r *request, snap *cluster.Snapshot, prefix string) []string {
		sees := r.sees(acl.ReadJob)
		return ids(prefix, func(p string) []*cluster.Evaluation { return snap.Evals(nil, p) },
			func(e *cluster.Evaluation) (string, bool) {
				return e.ID, within(r.namespace, e.Namespace) && sees(e.Namespace)
			})
	}},
	{"deployment", func(r *request, snap *cluster.Snapshot, prefix string) []string {
		sees := r.sees(acl.ReadJob)
		return ids(prefix, func(p string) []*cluster.Deployment { return snap.Deployments(nil, p) },
			func(d *cluster.Deployment) (string, bool) {
				return d.ID, within(r.namespace, d.Namespace) && sees(d.Namespace)
			})
	}},
	{"plugins", nil},
	{"volumes", nil},
	{"scaling_policy", nil},
	{"vars", nil},
	{"namespaces", func(r *request, snap *cluster.Snapshot, prefix string) (out []string) {
		for _, n := range snap.Namespaces(nil, prefix) {
			if r.may(acl.AnyInNamespace, n.Name, "") {
				out = append(out, n.Name)
			}
		}
		return out
	}},
	{"quotas", func(r *request, snap *cluster.Snapshot, prefix string) (out []string) {
		if r.may(acl.QuotaRead, "", "") {
			for _, q := range snap.Quotas(nil, prefix) {
				out = append(out, q.Name)
			}
		}
		return out
	}},
	{"host_volumes", nil},
}

func hasPrefix(s, prefix string) bool { return strings.HasPrefix(s, prefix) }

func within(asked, namespace string) bool { return asked == "*" || asked == namespace }

// ids finds IDs by a prefix of one; a prefix that no ID can have finds none.
func ids[T any](prefix string, list func(string) []T, of func(T) (string, bool)) []string {
	digits := strings.ToLower(strings.ReplaceAll(prefix, "-", ""))
	if strings.Trim(digits, "0123456789abcdef") != "" || len(digits) > 32 {
		return nil
	}
	var out []string
	for _, v := range list(hyphenate(digits)) {
		if id, ok := of(v); ok {
			out = append(out, id)
		}
	}
	return out
}

type searchReply struct {
	Matches     map[string][]string
	Truncations map[string]bool
	Index       uint64
}

func (s *Server) search(r *request) (any, error) {
	var req struct{ Prefix, Context, Namespace string }
	if err := r.decode(&req); err != nil {
		return nil, err
	}
	known := req.Context == "all" || req.Context == ""
	var names []string
	for _, c := range contexts {
		known = known || c.name == req.Context
		names = append(names, c.name)
	}
	if !known {
		return nil, refused(badRequest("context must be one of %v or 'all' for all contexts; got %q", names, req.Context))
	}
	if req.Namespace != "" && !r.query.Has("namespace") {
		r.namespace = req.Namespace
	}
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		reply := &searchReply{Matches: map[string][]string{}, Truncations: map[string]bool{}, Index: snap.Index(ws)}
		for _, c := range contexts {
			if req.Context != "all" && req.Context != "" && req.Context != c.name {
				continue
			}
			var matches []string
			if c.find != nil {
				matches = c.find(r, snap, req.Prefix)
				slices.Sort(matches)
			}
			reply.Truncations[c.name] = len(matches) > maxMatches
			reply.Matches[c.name] = append([]string{}, matches[:min(len(matches), maxMatches)]...)
		}
		return found{body: reply, index: reply.Index}
	})
}
