package place

import (
	"maps"
	"slices"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// Jobs of type system and sysbatch have one allocation of each group on every node that
// may run it (Nomad: https://developer.hashicorp.com/nomad/docs/concepts/scheduling/schedulers).
// There is nothing to choose: a node is filtered, and that is no failure; or it is full,
// and the job's evaluation waits for room there; or it gets an allocation. What runs on a
// node that takes no new work stays, until a drain asks it to go or the node is lost. Of a sysbatch
// job a node that is filtered for what the job's other groups do there is waited for: they end.

// DescStagger describes the evaluation that goes on with an update of a system job.
const DescStagger = "created to go on with the update once its stagger has passed"

// reconcileSystem compares what a group of a system job has with what it should have,
// node by node.
func (p *planner) reconcileSystem(g *group, allocs []*cluster.Allocation) {
	if g.spec.Count == 0 {
		p.stopGroup(g, allocs)
		return
	}
	g.nodes = p.newSearch(p.job, g.spec)
	on := map[string][]*cluster.Allocation{}
	for _, a := range allocs {
		if a.ServerTerminal() && !a.ClientTerminal() && p.silent(a) && !p.spared(a) {
			g.lose(a)
		}
		on[a.NodeID] = append(on[a.NodeID], a)
	}
	same := map[uint64]bool{} // by version: whether it can be changed in place
	open := map[string]bool{} // nodes without an allocation
	for _, id := range slices.Sorted(maps.Keys(on)) {
		open[id] = !p.reconcileNode(g, on[id], same)
	}
	for i := range g.nodes.list {
		h := g.nodes.list[i].host
		if list, known := on[h.node.ID]; !known || open[h.node.ID] {
			w := want{name: systemName(p.job, g), prev: leftBy(p.job, list), host: h}
			w.moves = w.prev != nil && !w.prev.Terminal()
			g.wants = append(g.wants, w)
		}
	}
}

// systemName is what all allocations of a system job's group are called, as in Nomad:
// they differ by their nodes.
func systemName(j *cluster.Job, g *group) string { return j.ID + "." + g.name + "[0]" }

// leftBy is the allocation on a node that a new one takes the place of: of those that
// nothing took the place of yet the newest; nil for none.
func leftBy(j *cluster.Job, list []*cluster.Allocation) (left *cluster.Allocation) {
	for _, a := range list {
		if a.NextAllocation == "" && a.JobCreateIndex == j.CreateIndex && (left == nil || left.CreateIndex < a.CreateIndex) {
			left = a
		}
	}
	return left
}

// reconcileNode decides what becomes of the group's allocations on one node; it says
// whether one of them stays there, or has done what is to be done.
func (p *planner) reconcileNode(g *group, list []*cluster.Allocation, same map[uint64]bool) (taken bool) {
	var holders []named
	for _, a := range list {
		if s := p.stateOf(a); s != ignored && s != leaving {
			holders = append(holders, named{a, s, 0})
		}
	}
	var holder *cluster.Allocation
	for _, h := range sortHolders(g.spec.Disconnect, holders) {
		if holder != nil {
			p.drop(g, h, holder)
			continue
		}
		if p.keepOnNode(g, h, same) {
			holder = h.Allocation
		}
	}
	return holder != nil
}

// keepOnNode decides what becomes of the allocation that a node has; false when the
// node is to have another one.
func (p *planner) keepOnNode(g *group, h named, same map[uint64]bool) bool {
	a := h.Allocation
	switch h.state {
	case lost:
		g.lose(a)
		return false
	case moving: // off a draining node or an unfit device, or stopped by hand: then the node gets another
		if p.admits(g, a.NodeID) {
			g.counts.Migrate++
		} else {
			g.counts.Stop++
		}
		why := descMigrating
		if p.onUnfit(a) {
			why = descUnfit
		}
		g.stop(a, why)
		return false
	case held:
		p.paused = true
	case unheard:
		if d := g.spec.Disconnect; d != nil && p.silent(a) {
			g.awaited = append(g.awaited, later{a, givenUp(d, a, p.in.Now)})
		}
	case failed:
		if set(a.DesiredTransition.ForceReschedule) && p.admits(g, a.NodeID) {
			g.stop(a, descRescheduled)
			return false
		}
	case running:
		return p.keepRunning(g, a, same)
	}
	g.counts.Ignore++ // what failed stays so: its restarts are used up, and there is no other node for it
	return true
}

// keepRunning keeps, changes or stops what runs.
func (p *planner) keepRunning(g *group, a *cluster.Allocation, same map[uint64]bool) bool {
	switch ready := p.byID[a.NodeID].node.Ready(); {
	case ready && !p.admits(g, a.NodeID):
		g.counts.Stop++
		g.stop(a, descNotNeeded)
		return false
	case !ready || p.current(a):
		g.counts.Ignore++
	case p.sameStart(g, a, same):
		g.inPlace = append(g.inPlace, a)
	default:
		g.destroy = append(g.destroy, a)
	}
	return true
}

// admits says whether a node takes work of the group, whatever it has left.
func (p *planner) admits(g *group, nodeID string) bool {
	h := p.byID[nodeID]
	return h != nil && g.nodes.at[h.index] >= 0
}

// sameStart says whether an allocation, on a node that admits the group, takes the job's
// version over as it runs.
func (p *planner) sameStart(g *group, a *cluster.Allocation, same map[uint64]bool) bool {
	if a.JobCreateIndex != p.job.CreateIndex {
		return false
	}
	is, known := same[a.JobVersion]
	if !known {
		old := p.reader.JobVersion(nil, a.JobKey(), a.JobVersion)
		is = old != nil && old.Type == p.job.Type && old.Group(g.name) != nil && sameStart(old, old.Group(g.name), p.job, g.spec)
		same[a.JobVersion] = is
	}
	return is
}

// planSystem writes the new allocations of a system job's group into the plan, and as
// many replacements of older versions as its update block allows now.
func (p *planner) planSystem(g *group) {
	updates := p.staggered(g)
	g.counts.DestructiveUpdate += uint64(len(updates))
	g.counts.Ignore += uint64(len(g.destroy) - len(updates))
	for _, w := range g.wants {
		if !w.moves {
			g.counts.Place++
		}
	}
	for _, a := range updates {
		g.wants = append(g.wants, want{name: a.Name, prev: a, stop: descUpdating, host: p.byID[a.NodeID]})
	}
	p.result.Queued[g.name] = 0
	for _, w := range g.wants {
		if p.full() {
			p.result.Queued[g.name]++
			continue
		}
		p.placeOn(g, w)
	}
}

// staggered chooses what is replaced now: of an update block that has one, at most
// max_parallel in any stretch of time as long as its stagger. An evaluation for the rest
// waits for the next time.
func (p *planner) staggered(g *group) []*cluster.Allocation {
	u := g.spec.Update
	if u == nil || u.MaxParallel <= 0 || u.Stagger <= 0 || len(g.destroy) == 0 {
		return g.destroy
	}
	limit, first := u.MaxParallel, cluster.Time(0) // first: of those that count, the oldest
	for _, a := range p.allocs {
		made := cluster.Time(a.CreateTime)
		switch {
		case a.TaskGroup != g.name:
		case a.ServerTerminal() && a.DesiredDescription == descUpdating && a.NextAllocation == "" && !a.ClientTerminal():
			limit-- // stopped first
		case p.current(a) && a.PreviousAllocation != "" && made.Add(u.Stagger) > p.in.Now:
			limit--
			first = earlier(first, made)
		}
	}
	updates := g.destroy[:min(max(limit, 0), len(g.destroy))]
	if len(updates) < len(g.destroy) {
		p.goOn(earlier(first, p.in.Now).Add(u.Stagger), u.Stagger)
	}
	return updates
}

func earlier(a, b cluster.Time) cluster.Time {
	if a == 0 {
		return b
	}
	return min(a, b)
}

// goOn makes the evaluation that goes on with an update, unless one waits already. The
// command line shows its Wait.
func (p *planner) goOn(at cluster.Time, wait time.Duration) {
	for _, e := range slices.Concat(p.reader.OpenEvalsByJob(p.in.Eval.JobKey()), p.followups) {
		if e.ID != p.in.Eval.ID && e.TriggeredBy == cluster.TriggerRollingUpdate && e.WaitUntil != 0 && e.WaitUntil <= at {
			return
		}
	}
	e := p.newEval(cluster.TriggerRollingUpdate, DescStagger)
	e.Status, e.Wait, e.WaitUntil = cluster.EvalStatusPending, wait, at
	p.followups = append(p.followups, e)
}

// placeOn places one allocation on its node, or says why the node has no room.
func (p *planner) placeOn(g *group, w want) {
	if w.stop != "" {
		p.vacate(w.prev, -1)
	}
	p.tally()
	fits, metric := g.nodes.only(w.host, p.onJob, p.onGroup[g.name])
	if fits {
		p.seat(g, p.job, g.nodes, w, w.host, metric)
		return
	}
	k := &g.nodes.list[g.nodes.at[w.host.index]]
	if k.exhausted == "" { // refused for the job's other groups: filtered
		if w.stop != "" {
			p.vacate(w.prev, 1)
		}
		if p.job.Finite() && p.result.Failed[g.name] == nil { // only until they have done what they are to do there
			p.result.Failed[g.name] = metric
		}
		return
	}
	switch first := p.result.Failed[g.name]; {
	case p.stopsFirst(g, g.nodes, w):
	case first == nil:
		p.result.Failed[g.name] = metric
	case first.DimensionExhausted == nil: // the quota's fault before any node's
		first.CoalescedFailures++
	default: // one metric tells of all full nodes
		first.CoalescedFailures++
		first.NodesExhausted++
		countExhausted(first.DimensionExhausted, first.ClassExhausted, k, 1)
	}
}

// only judges one node for one placement. A node that cannot take it is the only one
// that the metrics count as full: on the others the job may run.
func (s *search) only(h *host, job, group tallies) (fits bool, m *cluster.AllocMetric) {
	s.catchUp()
	k := &s.list[s.at[h.index]]
	metric := s.metric
	metric.DimensionExhausted, metric.ClassExhausted = map[string]int{}, map[string]int{}
	m = &metric
	if k.exhausted != "" {
		m.NodesExhausted = 1
		countExhausted(m.DimensionExhausted, m.ClassExhausted, k, 1)
		return false, m
	}
	x := choice{candidate: k, group: group.on(h.index)}
	if r := s.refusal(h.index, job.on(h.index), x.group); r != admitted {
		m.ConstraintFiltered = maps.Clone(m.ConstraintFiltered)
		if r == refusedHosts {
			m.NodesFiltered++
			m.ConstraintFiltered[operandDistinctHosts]++
		} else {
			l := s.limits[r]
			l.refused[l.of[h.index]]++
			m.NodesFiltered += l.reasons(m.ConstraintFiltered)
		}
		return false, m
	}
	x.norm = s.norm(&x)
	m.ScoreMetaData = []*cluster.NodeScore{{NodeID: h.node.ID, Scores: s.scores(&x), Norm: x.norm}}
	return true, m
}
