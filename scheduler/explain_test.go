package scheduler

import (
	"testing"

	"github.com/rxvision/rxvision/cluster"
)

// TestExplainPositions: jobs that wait are told their places by priority, then age; what is asked for is placed as
// what-if has said, and asking changes nothing.
func TestExplainPositions(t *testing.T) {
	inWorld(t, func(w *world) {
		n := w.node("n1", 1)
		hold := service("hold", 1, gpus(1), batch)
		before := w.State().Snapshot()
		x, err := new(DryRuns).WhatIf(before, hold, now())
		if err != nil || len(x.Groups) != 1 || len(x.Groups[0].Places) != 1 || x.Status != "" {
			t.Fatalf("%+v, %v", x, err)
		}
		if snap := w.State().Snapshot(); snap.Index(nil) != before.Index(nil) || snap.Hash() != before.Hash() {
			t.Error("asking has changed the state")
		}
		w.run(hold)
		w.settle()
		w.agents()
		a := w.wantLive(w.settle(), "hold", 1)[0]
		if seat := x.Groups[0].Places[0]; seat.Name != a.Name || seat.NodeID != n.ID || seat.NodeID != a.NodeID || seat.Devices[0].ID != a.AllocatedResources.Tasks["t"].Devices[0].DeviceIDs[0] {
			t.Errorf("told %+v, placed %+v", seat, a)
		}
		urgent := func(j *cluster.Job) { j.Priority = 70 }
		w.run(service("a", 1, gpus(1), batch))
		w.settle() // evaluations of one entry are equally old
		w.run(service("b", 1, gpus(1), batch))
		w.settle()
		w.run(service("c", 1, gpus(1), batch, urgent))
		snap := w.settle()
		q := newQueue()
		q.weigh(snap, now())
		q.sync(func(from uint64) []*cluster.Evaluation { return snap.OpenEvalsFrom(nil, from) }, snap.Index(nil, cluster.IndexCapacity), false, now())
		for id, want := range map[string][4]int{"c": {1, 3, 1, 1}, "a": {2, 3, 1, 2}, "b": {3, 3, 2, 2}} {
			p := q.position(snap, cluster.JobKey{Namespace: "default", ID: id})
			if p == nil || [4]int{p.Position, p.Of, p.InPriority, p.OfPriority} != want || !p.Blocked || p.InNamespace != p.Position {
				t.Errorf("%s: %+v, want %v", id, p, want)
			}
		}
		if p := q.position(snap, cluster.JobKey{Namespace: "default", ID: "hold"}); p != nil {
			t.Errorf("hold waits for nothing: %+v", p)
		}
		x = new(DryRuns).Explain(snap, cluster.JobKey{Namespace: "default", ID: "b"}, now())
		if h := x.Groups[0].Holders; len(h) != 1 || h[0].JobID != "hold" || h[0].Milli != 1000 || len(x.Evaluations) != 1 {
			t.Errorf("%+v", x)
		}
		if x := new(DryRuns).Explain(snap, cluster.JobKey{Namespace: "default", ID: "none"}, now()); x != nil {
			t.Errorf("%+v", x)
		}
	})
}

// TestExplainQuota: a quota that is used up is told with who uses it.
func TestExplainQuota(t *testing.T) {
	inWorld(t, func(w *world) {
		cpu := int64(2000)
		w.must(&cluster.UpsertQuotas{Quotas: []*cluster.Quota{{Name: "q", Limits: []*cluster.QuotaLimit{{Region: "global", CPU: &cpu}}}}})
		w.must(&cluster.UpsertNamespaces{Namespaces: []*cluster.Namespace{{Name: "one", Quota: "q"}, {Name: "two", Quota: "q"}}})
		w.node("n1", 0)
		w.run(service("first", 2, batch, in("one")))
		w.settle()
		w.run(service("second", 1, batch, in("two")))
		snap := w.settle()
		x := new(DryRuns).Explain(snap, cluster.JobKey{Namespace: "two", ID: "second"}, now())
		used := int64(0)
		for _, a := range snap.Allocs(nil, "") {
			used += a.AllocatedResources.Tasks["t"].Cpu.CpuShares
		}
		q := x.Quota
		if q == nil || q.Quota != "q" || len(q.Exceeded) == 0 || q.Lines[0].Used != used || q.Lines[0].Limit != cpu || q.Namespaces[0].Namespace != "one" || q.Namespaces[0].Used["cpu"] != used {
			t.Errorf("used %d: %+v", used, q)
		}
		if g := x.Groups[0]; g.Queued != 1 || len(g.Holders) != 0 {
			t.Errorf("%+v", g)
		}
	})
}
