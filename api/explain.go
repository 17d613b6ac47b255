package api

import (
	"context"
	"fmt"
	"net/http"
	"net/url"

	"github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/acl"
	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/jobspec"
)

const (
	// maxExplaining bounds the explanations under way on one server; each plans a job on the whole region.
	maxExplaining = 2
	// maxNearest bounds the names that one which is not there is compared with.
	maxNearest = 10_000
)

// WhatIf is what would become of a job.
type WhatIf struct {
	*cluster.Explanation
	Warnings string `json:",omitempty"`
}

// explain runs at most maxExplaining explanations at a time; the others wait.
func (s *Server) explain(ctx context.Context, run func() (*cluster.Explanation, error)) (*cluster.Explanation, error) {
	if s.cfg.Planner == nil {
		return nil, notBuilt("this server cannot explain jobs: it runs without a scheduler")
	}
	select {
	case s.explaining <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { <-s.explaining }()
	return run()
}

func (s *Server) explainJob(r *request) (any, error) {
	if !r.stale {
		if err := s.fresh(r); err != nil {
			return nil, err
		}
	}
	snap, key := s.cfg.Store.State().Snapshot(), r.jobKey()
	if snap.Job(nil, key) == nil {
		return nil, notFound("job %q not found in namespace %q%s", clip(key.ID), clip(key.Namespace), nearestJob(r, snap, key))
	}
	x, err := s.explain(r.Context(), func() (*cluster.Explanation, error) { return s.cfg.Planner.Explain(r.Context(), snap, key) })
	if err != nil {
		return nil, err
	}
	conceal(r, x)
	return &answer{body: x, index: x.Index, read: true}, nil
}

// nearestJob names a job that may be meant, of those that the caller may read.
func nearestJob(r *request, snap *cluster.Snapshot, key cluster.JobKey) string {
	jobs := seen(r, acl.ReadJob, snap.Jobs(nil, "*", ""), func(j *cluster.Job) string { return j.Namespace })
	var names []string
	for _, j := range jobs {
		switch {
		case j.ID == key.ID:
			return fmt.Sprintf("; namespace %q has it", j.Namespace)
		case j.Namespace == key.Namespace && len(names) < maxNearest:
			names = append(names, j.ID)
		}
	}
	if best := jobspec.Nearest(key.ID, names); best != "" {
		return fmt.Sprintf("; did you mean %q?", best)
	}
	return ""
}

func (s *Server) whatIf(r *request) (any, error) {
	j, warnings, err := s.jobToPlan(r, new(api.JobPlanRequest))
	if err != nil {
		return nil, err
	}
	snap := s.cfg.Store.State().Snapshot()
	x, err := s.explain(r.Context(), func() (*cluster.Explanation, error) { return s.cfg.Planner.WhatIf(r.Context(), snap, j) })
	if err != nil {
		return nil, refused(err)
	}
	conceal(r, x)
	return &answer{body: &WhatIf{x, warnings}, index: x.Index, read: true}, nil
}

// conceal leaves of an explanation what the caller may see: of jobs in namespaces that they may not read, counts only; of
// quotas' users the same; and names of nodes, where nothing of the job is, only with node:read.
func conceal(r *request, x *cluster.Explanation) {
	if r.caller.acl.IsManagement() {
		return
	}
	sees := r.sees(acl.ReadJob)
	victims := func(list []*cluster.Victim) {
		for _, v := range list {
			if !sees(v.Namespace) {
				*v = cluster.Victim{Hidden: true, For: v.For, Priority: v.Priority, LostSeconds: v.LostSeconds, Milli: v.Milli}
			}
		}
	}
	victims(x.Preempts)
	for _, w := range x.Waits {
		victims(w.Awaits)
	}
	for _, g := range x.Groups {
		g.Holders = concealHolders(g.Holders, sees)
		if g.Start != nil {
			g.Start.Because = concealHolders(g.Start.Because, sees)
		}
		if g.Preempt != nil {
			victims(g.Preempt.Victims)
		}
		if !r.may(acl.NodeRead, "", "") {
			g.MoreUnfit, g.Unfit = g.MoreUnfit+len(g.Unfit), nil
			for _, f := range g.Filters {
				f.Examples = nil
			}
			for _, short := range g.Shortages {
				short.Examples = nil
			}
		}
	}
	if x.Quota == nil {
		return
	}
	for _, u := range x.Quota.Namespaces {
		if u.Namespace != x.Namespace && !r.may(acl.AnyInNamespace, u.Namespace, "") {
			u.Namespace, u.Quota, u.Hidden = "", "", true
		}
	}
}

// concealHolders adds up those that may not be named.
func concealHolders(list []*cluster.Holder, sees func(namespace string) bool) []*cluster.Holder {
	var out []*cluster.Holder
	var hidden *cluster.Holder
	for _, h := range list {
		if sees(h.Namespace) {
			out = append(out, h)
			continue
		}
		if hidden == nil {
			hidden = &cluster.Holder{Hidden: true}
			out = append(out, hidden)
		}
		hidden.Join(h)
	}
	return out
}

// Explain says how a job stands, what it waits for, and who holds that. namespace "" is the default one.
func (c *Client) Explain(ctx context.Context, namespace, id string) (*cluster.Explanation, error) {
	query := url.Values{}
	if namespace != "" {
		query.Set("namespace", namespace)
	}
	out := new(cluster.Explanation)
	return out, c.get(ctx, []string{"job", id, "explain"}, query, out)
}

// WhatIf says what would become of a job if it were registered, and registers nothing.
func (c *Client) WhatIf(ctx context.Context, namespace string, job *api.Job) (*WhatIf, error) {
	if namespace != "" && job.Namespace == nil {
		job.Namespace = &namespace
	}
	out := new(WhatIf)
	return out, c.call(ctx, http.MethodPut, []string{"jobs", "what-if"}, &api.JobPlanRequest{Job: job}, out)
}
