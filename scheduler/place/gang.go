package place

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/rxvision/rxvision/cluster"
)

// maxDomains bounds the domains of one level of a gang's topology that are tried, the
// smallest that may hold it first.
const maxDomains = 32

// startedAnew says whether a gang's allocation that has ended well was begun again with its gang.
func (p *planner) startedAnew(a *cluster.Allocation) bool {
	g := p.job.Group(a.TaskGroup)
	return g != nil && g.Gang != nil && a.NextAllocation != ""
}

// assemble makes the changes of a gang whole. Its members need each other: when one must be
// replaced, whatever for, all stop and begin anew; when one has failed for good, or its
// deployment has and replaces it no more, the others stop too.
func (p *planner) assemble(g *group, holding []*cluster.Allocation, states []state) {
	changes := len(g.wants) > 0 || len(g.destroy) > 0 && !p.halted()
	if p.deploymentFailed() && lacks(g, holding, states) {
		p.stopMembers(g, holding, states)
		return
	}
	for i, a := range holding {
		switch {
		case a == nil:
		case states[i] == held, g.held: // all wait
			g.wants, g.destroy = nil, nil
			return
		case states[i] == failed && !p.replaceable(g, a):
			p.stopMembers(g, holding, states)
			return
		}
	}
	if !changes {
		return
	}
	wants := map[string]want{}
	var event bool // something counts as a reschedule: then it does for all
	for _, w := range g.wants {
		if w.stop != "" { // it has failed: it needs not wait for the others
			g.stop(w.prev, w.stop)
			w.stop = ""
		}
		event = event || w.rescheduled != nil
		wants[w.name] = w
	}
	for i, a := range holding {
		if a == nil {
			continue
		}
		w, wanted := wants[a.Name]
		if !wanted {
			w = want{name: a.Name, prev: a}
		}
		switch updated := slices.Contains(g.destroy, a); {
		case wanted: // lost, moving or failed: told above
		case updated:
			g.stop(a, descUpdating)
			g.counts.DestructiveUpdate++
			w.moves = true
		case states[i] == failed: // its turn was to come later
			g.stop(a, descRescheduled)
			g.counts.Ignore--
		case states[i] == running, states[i] == unheard:
			g.stop(a, descGang)
			if !slices.Contains(g.inPlace, a) {
				g.counts.Ignore--
			}
		case states[i] == done:
			g.counts.Ignore--
		}
		wants[a.Name] = w
	}
	g.wants = g.wants[:0]
	for _, w := range wants {
		if event && w.prev != nil {
			w.rescheduled = p.rescheduleEvent(w.prev)
		}
		g.wants = append(g.wants, w)
	}
	g.destroy, g.inPlace, g.later, g.kept = nil, nil, nil, nil
}

// lacks says whether a gang has lost a member that nothing replaces, now or later.
func lacks(g *group, holding []*cluster.Allocation, states []state) bool {
	for i, a := range holding {
		if (a == nil || states[i] == failed) &&
			!slices.ContainsFunc(g.wants, func(w want) bool { return nameIndex(w.name) == i }) &&
			!slices.ContainsFunc(g.later, func(l later) bool { return nameIndex(l.alloc.Name) == i }) {
			return true
		}
	}
	return false
}

// replaceable says whether a failed allocation is replaced at some time.
func (p *planner) replaceable(g *group, a *cluster.Allocation) bool {
	_, ok := p.nextTry(g, a)
	return ok || set(a.DesiredTransition.Reschedule)
}

// stopMembers ends a gang of which one has failed for good.
func (p *planner) stopMembers(g *group, holding []*cluster.Allocation, states []state) {
	for i, a := range holding {
		if a == nil || a.ClientTerminal() {
			continue
		}
		switch states[i] {
		case running, unheard, failed: // one that is unhealthy has failed and runs on
			if !slices.ContainsFunc(g.wants, func(w want) bool { return w.prev == a }) && !slices.Contains(g.inPlace, a) && !slices.Contains(g.destroy, a) {
				g.counts.Ignore--
			}
			g.counts.Stop++
			g.stop(a, descGangFailed)
		}
	}
	g.wants, g.destroy, g.inPlace, g.later = nil, nil, nil, nil
}

// ends says whether the allocation is still on its way to its end.
func (p *planner) ends(a *cluster.Allocation) bool {
	return a != nil && !a.ClientTerminal() && !p.silent(a)
}

// placeGang places all that a gang wants, or nothing.
func (p *planner) placeGang(g *group, nodes *search) {
	if p.full() { // it is never cut
		p.result.Queued[g.name] = len(g.wants)
		return
	}
	claims := p.claimsOf(g)
	if slices.ContainsFunc(claims, p.waiting) {
		p.result.Queued[g.name] = len(g.wants)
		p.claims = append(p.claims, claims...)
		return
	}
	if p.gangEnds(g) { // collective work goes on only once all that was before is over
		p.result.Queued[g.name] = len(g.wants)
		p.requeued = true
		if t := p.newTrial(g, nodes, false); !slices.ContainsFunc(g.wants, func(w want) bool { return w.prev != nil && evicted(w.prev) }) && t.run(g.wants) {
			p.commit(t)
		}
		return
	}
	var members []*cluster.Allocation
	var metric *cluster.AllocMetric
	preempted := slices.ContainsFunc(claims, func(c *cluster.Claim) bool { return len(c.Preempts) > 0 })
	if preempted {
		members = p.redeemGang(g, nodes, claims)
	}
	if members == nil {
		if members, metric = p.tryGang(g, nodes); members != nil {
			p.sortMembers(g, members)
		}
	}
	if members == nil && !preempted {
		members = p.redeemGang(g, nodes, claims)
	}
	if members == nil {
		p.failGang(g, nodes, metric)
		return
	}
	for i, w := range g.wants {
		p.settle(g, p.job, w, members[i])
	}
	p.result.Plan.Gangs = append(p.result.Plan.Gangs, g.name)
}

// gangEnds says whether something of the gang, as it was, has not ended yet.
func (p *planner) gangEnds(g *group) bool {
	return slices.ContainsFunc(p.allocs, func(a *cluster.Allocation) bool { return a.TaskGroup == g.name && p.ends(a) })
}

// tryGang gives all members their places, in the smallest domain of the narrowest level
// of the topology that holds them; none, with the reason, if not all fit.
func (p *planner) tryGang(g *group, nodes *search) (members []*cluster.Allocation, metric *cluster.AllocMetric) {
	defer func() { nodes.within = nil }()
	n := len(g.wants)
	var avoid []string
	for _, w := range g.wants {
		if w.rescheduled != nil {
			avoid = append(avoid, w.rescheduled.PrevNodeID)
		}
	}
	best, where := 0, "" // how many would fit, in one domain
	for _, target := range g.spec.Gang.Topology {
		domains, most, value := p.domains(nodes, target, n)
		if best, where = most, fmt.Sprintf(" with %s = %s", target, value); most == 0 {
			where = ""
		}
		for _, d := range domains {
			nodes.within = d
			if members, metric = p.occupyAll(g, nodes, avoid, n); len(members) == n {
				return members, nil
			}
			p.leaveAll(members)
		}
	}
	if !g.spec.Gang.Required {
		nodes.within = nil
		if members, metric = p.occupyAll(g, nodes, avoid, n); len(members) == n {
			return members, nil
		}
		best, where = len(members), ""
		p.leaveAll(members)
	}
	if metric == nil { // no domain is large enough
		nodes.catchUp()
		metric = nodes.metrics(refusals{})
	}
	metric.DimensionExhausted[fmt.Sprintf("gang: %d of %d members fit at once%s", min(best, n), n, where)] += max(1, metric.NodesExhausted)
	metric.NodesExhausted = max(1, metric.NodesExhausted)
	return nil, metric
}

// occupyAll places up to n members one after the other, as many as fit; with fewer than
// n it says why the next does not.
func (p *planner) occupyAll(g *group, nodes *search, avoid []string, n int) (members []*cluster.Allocation, metric *cluster.AllocMetric) {
	for len(members) < n {
		e := p.excess(g.ask)
		if e == nil {
			p.tally()
			h, m := nodes.best(avoid, p.onJob, p.onGroup[g.name])
			if h == nil {
				return members, m
			}
			var a *cluster.Allocation
			if a, e = p.occupy(g, nodes, h, m); e == nil {
				members = append(members, a)
			}
		}
		if e != nil {
			m := nodes.metrics(refusals{})
			m.QuotaExhausted, p.quota = e.reasons, e.allowance.Quota
			return members, m
		}
	}
	return members, nil
}

func (p *planner) leaveAll(members []*cluster.Allocation) {
	for _, a := range members {
		p.leave(a)
	}
}

// sortMembers orders places so that neighbours share as much of the topology as they can:
// the ranks go by it.
func (p *planner) sortMembers(g *group, members []*cluster.Allocation) {
	key := func(a *cluster.Allocation) (key []string) {
		h := p.byID[a.NodeID]
		for _, target := range slices.Backward(g.spec.Gang.Topology) {
			value, _ := nodeLookup(h.node)(target)
			key = append(key, value)
		}
		return append(key, h.node.ID)
	}
	slices.SortStableFunc(members, func(a, b *cluster.Allocation) int { return slices.Compare(key(a), key(b)) })
}

// domain is the hosts that share a value of an attribute.
type domain struct {
	*property
	value int32
	room  int // members that fit there at once, up to a bound
}

// domains are those that may hold n members, the smallest first. most is how many the
// roomiest holds, and value what its hosts share.
func (p *planner) domains(nodes *search, target string, n int) (out []*domain, most int, value string) {
	p.tally()
	nodes.catchUp()
	of := p.property(target)
	rooms := make([]int, len(of.values))
	for i := range nodes.list {
		k := &nodes.list[i]
		host := k.host.index
		v := of.of[host]
		if v < 0 || rooms[v] >= 4*n || k.exhausted != "" || nodes.refusal(host, p.onJob.on(host), p.onGroup[nodes.demand.group.Name].on(host)) != admitted {
			continue
		}
		rooms[v] += nodes.room(k.host, n)
	}
	for v, room := range rooms {
		if room > most {
			most, value = room, of.values[v]
		}
		if room >= n {
			out = append(out, &domain{of, int32(v), room})
		}
	}
	slices.SortFunc(out, func(a, b *domain) int {
		return cmp.Or(cmp.Compare(a.room, b.room), cmp.Compare(of.values[a.value], of.values[b.value]))
	})
	return out[:min(len(out), maxDomains)], most, value
}

// room counts how many placements fit on a host at once, up to limit.
func (s *search) room(h *host, limit int) (n int) {
	if s.demand.distinctHosts || s.demand.distinctInGroup {
		limit = 1
	}
	var taken []*cluster.Allocation
	for ; n < limit && s.demand.exhausted(h) == ""; n++ {
		r, err := s.demand.take(h, fmt.Sprint(n), nil)
		if err != nil {
			break
		}
		a := &cluster.Allocation{AllocatedResources: r}
		h.use.Add(a)
		h.roomAt = 0
		taken = append(taken, a)
	}
	for _, a := range taken {
		h.use.Remove(a)
	}
	h.roomAt = 0
	return n
}

// outside says whether the search is for a domain that the host is not in, or leaves the host out.
func (s *search) outside(host int) bool {
	return s.without != nil && s.without.index == host || s.within != nil && s.within.of[host] != s.within.value
}

// failGang notes that a gang has no room.
func (p *planner) failGang(g *group, nodes *search, metric *cluster.AllocMetric) {
	p.result.Queued[g.name] += len(g.wants)
	metric.CoalescedFailures += len(g.wants) - 1
	if len(metric.QuotaExhausted) > 0 { // nobody who leaves helps
		p.result.Failed[g.name] = metric
		return
	}
	p.miss(g, nodes, g.wants, metric)
}
