package place

import (
	"cmp"

	"github.com/rxvision/rxvision/cluster"
)

// keepUnheard deals with an allocation whose node is silent and that may come
// back. While no other has its name another runs in its place, if the disconnect
// block wants that and the reschedule policy has an attempt left: at once, since
// the policy's delays are for work that fails.
func (p *planner) keepUnheard(g *group, h named, replaced bool, newer *cluster.Allocation) {
	a, d := h.Allocation, g.spec.Disconnect
	if !p.silent(a) || d == nil { // its node is back and will tell
		g.counts.Ignore++
		return
	}
	g.awaited = append(g.awaited, later{a, givenUp(d, a, p.in.Now)})
	_, allowed := nextReschedule(g.spec.ReschedulePolicy, a)
	if replaced || !allowed || !d.Replace {
		g.counts.Ignore++
		return
	}
	w := want{name: a.Name, prev: a, away: true, rescheduled: p.rescheduleEvent(a)}
	if newer != nil {
		w.prev, w.rescheduled = newer, nil
	}
	g.wants = append(g.wants, w)
}

// preferred orders two allocations of one name and version that both live, by
// what the disconnect block says of originals and replacements (Nomad: reconcile).
func preferred(d *cluster.DisconnectStrategy, a, b *cluster.Allocation) int {
	older := cmp.Compare(a.CreateIndex, b.CreateIndex)
	if d == nil {
		return -older
	}
	runs := func(x *cluster.Allocation) int {
		if x.ClientStatus == cluster.AllocClientRunning {
			return 0
		}
		return 1
	}
	switch d.Reconcile {
	case cluster.ReconcileKeepOriginal:
		return older
	case cluster.ReconcileKeepReplacement:
		return -older
	case cluster.ReconcileLongestRunning:
		return cmp.Or(cmp.Compare(runs(a), runs(b)), cmp.Compare(startedAt(a), startedAt(b)), older)
	}
	return cmp.Or(cmp.Compare(runs(a), runs(b)), cmp.Compare(score(b), score(a)), older)
}

// startedAt is since when all tasks of an allocation have run without a break.
func startedAt(a *cluster.Allocation) (at cluster.Time) {
	for _, s := range a.Whole().TaskStates {
		if s != nil {
			at = max(at, s.StartedAt)
		}
	}
	return at
}

// score is what the allocation's node was worth when it was placed there.
func score(a *cluster.Allocation) int64 {
	if m := a.Whole().Metrics; m != nil {
		for _, s := range m.ScoreMetaData {
			if s.NodeID == a.NodeID {
				return s.Norm
			}
		}
	}
	return 0
}
