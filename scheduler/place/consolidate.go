package place

import (
	"cmp"
	"slices"

	"github.com/rxvision/rxvision/cluster"
)

// Bounds of consolidation: maxMoves for one placement, and of how many hosts the cheapest are looked at.
const (
	maxMoves     = 4
	maxMoveHosts = 64
)

// What consolidation says of allocations and evaluations.
const (
	descMoved = "Moved to make room for alloc ID "

	DescMoves = "created to place allocations that were moved to make room for others"
)

// settlement is one kind of work for which consolidation was tried in vain: it is as vain for all other work of the kind,
// as long as this view knows of nothing more that leaves.
type settlement struct {
	of       *candidates
	priority int
	leaving  int
}

// clearing is a host on which a want has room once some have moved elsewhere.
type clearing struct {
	*host
	units []*unit
	lost  int64
	tie   uint64
}

// consolidate makes room for one allocation by moving others that say they may be moved
// (group meta rx_movable), each to where it has room now: fewest first, then those that lose least work. Nobody loses his
// place: the moved have claims on theirs. It says whether it did.
func (p *planner) consolidate(m missing) bool {
	if len(m.wants) != 1 || m.group.spec.Gang != nil || !p.preempts() {
		return false
	}
	p.lowestRanks()
	if p.movers == 0 {
		return false
	}
	kind := settlement{m.nodes.candidates, p.job.Priority, len(p.evictions) + len(p.stopping)}
	if len(p.allocs) == 0 && p.settled[kind] {
		return false
	}
	t := p.newTrial(m.group, m.nodes, true)
	t.nodes.catchUp()
	t.tally()
	found := t.clearings()
	slices.SortFunc(found, func(a, b clearing) int {
		return cmp.Or(cmp.Compare(len(a.units), len(b.units)), cmp.Compare(a.lost, b.lost), cmp.Compare(a.tie, b.tie))
	})
	for _, c := range found[:min(len(found), maxMoveHosts)] {
		if homes := t.homes(c); homes != nil && t.clear(c, m.wants[0], homes) {
			return true
		}
	}
	if len(p.allocs) == 0 && len(p.claims) == 0 && len(m.nodes.limits) == 0 {
		p.settled[kind] = true
	}
	return false
}

// moves says whether an occupant may be moved for this plan's job. Work with devices does not make way for work without.
func (t *trial) moves(o *occupant) bool {
	return o.policy.Move && (o.milli == 0 || len(t.nodes.demand.devices) > 0) && o.rank <= t.job.Priority && t.within(o) && !t.updated[o.ID] &&
		(o.policy.MinRuntime == 0 || o.began.Add(o.policy.MinRuntime) <= t.in.Now)
}

// clearings are the hosts that would have room if a few of those that may be moved left.
func (t *trial) clearings() (out []clearing) {
	for i, at := range t.nodes.at {
		if at < 0 {
			continue
		}
		h := t.nodes.list[at].host
		q := t.quarryOf(h)
		if t.apart[i] || t.nodes.outside(i) || len(q.movable) == 0 ||
			t.nodes.refusal(i, t.onJob.on(i), t.onGroup[t.group.name].on(i)) != admitted {
			continue
		}
		th := t.host(h)
		if top := th.level(t.job.Priority); top == nil || !top.enough(t.nodes.demand) {
			continue
		}
		var units []*unit
		for _, n := range q.movable {
			if o := &q.held[n]; t.moves(o) {
				units = append(units, t.unitOf(h, o))
			}
		}
		c := clearing{host: h, tie: mix(t.nodes.seed ^ h.hash)}
		for _, order := range []func(a, b *unit) int{
			func(a, b *unit) int { return cmp.Or(cmp.Compare(b.size, a.size), cmp.Compare(a.lost, b.lost)) },
			func(a, b *unit) int { return cmp.Or(cmp.Compare(a.size, b.size), cmp.Compare(a.lost, b.lost)) },
		} {
			slices.SortStableFunc(units, order)
			if chosen := t.enough(h, units); chosen != nil && (c.units == nil || len(chosen) < len(c.units)) {
				c.units = chosen
			}
		}
		if c.units == nil || len(c.units) > maxMoves {
			continue
		}
		for _, u := range c.units {
			c.lost += u.lost
		}
		out = append(out, c)
	}
	return out
}

// home is where an occupant of a clearing goes.
type home struct {
	of    *occupant
	claim *cluster.Claim
}

// homes finds a place elsewhere for each that leaves a clearing, the largest first; nil if one has none. Work whose
// place depends on where the rest of its job is stays, and so does that of jobs that wait for something.
func (t *trial) homes(c clearing) (homes []home) {
	type taken struct {
		host *host
		by   *cluster.Allocation
	}
	var all []taken
	defer func() {
		for _, x := range all {
			t.unplan(x.host, x.by)
		}
	}()
	leave := slices.SortedStableFunc(slices.Values(c.units), func(a, b *unit) int { return cmp.Compare(b.size, a.size) })
	for _, u := range leave {
		o := t.occupantOf(u.members[0])
		if len(t.reader.OpenEvalsByJob(o.JobKey())) > 0 {
			return nil
		}
		g := o.job.Group(o.TaskGroup)
		d := newDemand(o.job, g)
		if d.distinctHosts || d.distinctInGroup || len(d.distinct) > 0 || len(spreadsOf(o.job, g)) > 0 {
			return nil
		}
		s := &search{candidates: t.candidatesFor(d), view: t.View, demand: d, seed: t.nodes.seed, without: c.host}
		h, _ := s.best(nil, nil, nil)
		if h == nil {
			return nil
		}
		id := t.in.NewID()
		r, err := d.take(h, id, s.mix)
		if err != nil {
			return nil
		}
		by := &cluster.Allocation{ID: id, AllocatedResources: r}
		t.plan(h, by)
		all = append(all, taken{h, by})
		homes = append(homes, home{o, &cluster.Claim{AllocID: id, Name: o.Name, TaskGroup: o.TaskGroup, JobVersion: o.JobVersion, NodeID: h.node.ID, Resources: r}})
	}
	return homes
}

// clear gives the want its place in a clearing, and those that leave it claims on their homes; false, and nothing has changed,
// if the place does not do after all: its devices may count for the quota, or suit several asks, otherwise than was foreseen.
func (t *trial) clear(c clearing, w want, homes []home) bool {
	for _, x := range homes {
		t.gone[x.of.ID] = true
	}
	t.part(c.host)
	id := t.in.NewID()
	r, err := t.nodes.demand.take(t.host(c.host).host, id, t.nodes.mix)
	t.claims = []*cluster.Claim{{
		AllocID: id, Name: w.name, TaskGroup: t.group.name, JobVersion: t.job.Version, NodeID: c.node.ID, Resources: r,
	}}
	if err != nil || !t.allowed() {
		t.claims = nil
		clear(t.gone)
		return false
	}
	t.units = c.units
	t.commit(t)
	for _, s := range t.result.Plan.Stop {
		if s.PreemptedBy == id {
			s.DesiredDescription = descMoved + id
		}
	}
	var evals []*cluster.Evaluation // one for each job
	for _, x := range homes {
		job := x.of.job
		i := slices.IndexFunc(evals, func(e *cluster.Evaluation) bool { return e.JobKey() == job.Key() })
		if i < 0 {
			e := t.newEval(cluster.TriggerPreemption, DescMoves)
			e.Namespace, e.JobID, e.Priority, e.Type, e.JobModifyIndex = job.Namespace, job.ID, job.Priority, job.Type, job.JobModifyIndex
			e.PreviousEval, e.Status = "", cluster.EvalStatusBlocked
			i, evals = len(evals), append(evals, e)
		}
		evals[i].Claims = append(evals[i].Claims, x.claim)
	}
	for _, e := range evals {
		t.stand(e.JobKey(), e.Priority, e.Claims)
	}
	t.followups = append(t.followups, evals...)
	return true
}
