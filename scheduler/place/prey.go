package place

import (
	"cmp"
	"math"
	"slices"

	"github.com/rxvision/rxvision/cluster"
)

// maxOccupants bounds what a Cache keeps from one snapshot to the next of what preemption knows of allocations; one takes
// some 200 bytes.
const maxOccupants = 250_000

// occupant is an allocation that holds something of a host, as preemption sees it.
type occupant struct {
	*cluster.Allocation
	job    *cluster.Job // its version, nil when that is gone
	rank   int          // the job's priority
	ended  bool         // it has ended, or was told to
	policy cluster.PreemptPolicy
	gang   bool
	system bool
	began  cluster.Time
	saved  cluster.Time // its last checkpoint
	milli  int64        // thousandths of devices
	use    *cluster.NodeUse
	holds  []hold
	lentIn uint64 // the view in which lent was worked out
	lent   bool
}

// hold is what an occupant has of one healthy device, by its place in the host's room.
type hold struct {
	at  int
	use cluster.DeviceUse
}

// newOccupant looks at an allocation of a version of a job; h is nil when nobody asks what it holds of its host.
func newOccupant(h *host, a *cluster.Allocation, job *cluster.Job) occupant {
	o := occupant{Allocation: a, began: beganAt(a), milli: devicesOf(a), ended: a.Terminal()}
	if job != nil && job.CreateIndex == a.JobCreateIndex {
		if g := job.Group(a.TaskGroup); g != nil {
			o.job, o.rank, o.gang, o.system = job, job.Priority, g.Gang != nil, job.PerNode()
			if g.Preempt != nil {
				o.policy = *g.Preempt
			}
		}
	}
	for _, c := range a.Checkpoints {
		o.saved = max(o.saved, c.Time)
	}
	if h == nil {
		return o
	}
	o.use = cluster.NewNodeUse(h.node)
	o.use.Add(a)
	if len(o.use.Devices) == 0 {
		return o
	}
	at := 0
	for _, g := range h.node.NodeResources.Devices {
		for _, d := range g.Instances {
			if !d.Healthy {
				continue
			}
			if use, holds := o.use.Devices[d.ID]; holds {
				o.holds = append(o.holds, hold{at, use})
			}
			at++
		}
	}
	return o
}

// lost is the work of an occupant, in seconds, since its last checkpoint or its start.
func (o *occupant) lost(now cluster.Time) int64 {
	return max(0, int64(now-max(o.began, min(o.saved, now)))/1e9)
}

// stays says whether nothing has changed by which another could be preempted or be in the way.
func (o occupant) stays(now occupant) bool {
	return o.ID == now.ID && o.job == now.job && o.ended == now.ended && evicted(o.Allocation) == evicted(now.Allocation) &&
		o.began == now.began && slices.Equal(o.holds, now.holds) && o.use.CPU == now.use.CPU && o.use.Memory == now.use.Memory && o.use.Disk == now.use.Disk
}

// quarry is what may come of preemption on a host, whoever preempts. It changes with each record of what is there.
type quarry struct {
	held    []occupant // by ID
	movable []int32    // those of them that may be moved
	rising  []int32    // those whose job is known and that have not been told to end, by the job's priority
	ending  bool       // something leaves in any case
}

// quarryOf looks at a host, unless no allocation has changed since; what is known of records that are still the same stays.
func (v *View) quarryOf(h *host) *quarry {
	if h.quarry != nil && h.quarryAt == v.written {
		return h.quarry
	}
	list := v.reader.AllocsHolding(nil, h.node.ID)
	h.quarryAt = v.written
	if h.quarry != nil && slices.EqualFunc(h.quarry.held, list, func(o occupant, a *cluster.Allocation) bool { return o.Allocation == a }) {
		return h.quarry
	}
	q := &quarry{held: make([]occupant, 0, len(list))}
	old := h.quarry
	if old == nil {
		old = &quarry{}
	}
	i := 0
	for _, a := range list {
		for i < len(old.held) && old.held[i].ID < a.ID {
			i++
		}
		if i < len(old.held) && old.held[i].Allocation == a {
			q.held = append(q.held, old.held[i])
		} else {
			q.held = append(q.held, newOccupant(h, a, v.reader.JobVersion(nil, a.JobKey(), a.JobVersion)))
		}
		q.ending = q.ending || q.held[len(q.held)-1].ended
	}
	for i := range q.held {
		if o := &q.held[i]; o.job != nil && !o.ended {
			q.rising = append(q.rising, int32(i))
			if o.policy.Move && !o.gang && !o.system {
				q.movable = append(q.movable, int32(i))
			}
		}
	}
	slices.SortStableFunc(q.rising, func(a, b int32) int { return cmp.Compare(q.held[a].rank, q.held[b].rank) })
	v.occupants += len(q.held) - len(old.held)
	if h.quarry == nil || !slices.EqualFunc(old.held, q.held, occupant.stays) {
		v.note(h)
	}
	h.quarry = q
	return q
}

// occupantOf gives an allocation as preemption sees it.
func (v *View) occupantOf(a *cluster.Allocation) *occupant {
	h := v.byID[a.NodeID]
	if h != nil {
		held := v.quarryOf(h).held
		if i, there := slices.BinarySearchFunc(held, a.ID, func(o occupant, id string) int { return cmp.Compare(o.ID, id) }); there && held[i].Allocation == a {
			return &held[i]
		}
	}
	o := newOccupant(h, a, v.reader.JobVersion(nil, a.JobKey(), a.JobVersion))
	return &o
}

// lends says whether an occupant runs on what its namespace has borrowed.
func (v *View) lends(o *occupant) bool {
	if o.lentIn != v.number {
		o.lentIn, o.lent = v.number, slices.ContainsFunc(v.borrowed(o.Namespace), func(b cluster.Borrowed) bool { return b.Of(o.AllocatedResources) > 0 })
	}
	return o.lent
}

// shield says what keeps an occupant from being preempted by this plan's job, "" for nothing; of a time, until when.
func (p *planner) shield(o *occupant, owed bool) (kind string, until cluster.Time) {
	lower := o.rank+PriorityGap <= p.job.Priority
	switch {
	case o.system:
		return cluster.ObstacleSystem, 0
	case o.policy.Never:
		return cluster.ObstacleNever, 0
	case !lower && !(o.policy.Reclaim && owed && p.lends(o)):
		return cluster.ObstaclePriority, 0
	case o.policy.MinRuntime > 0:
		if free := o.began.Add(o.policy.MinRuntime); free > p.in.Now {
			return cluster.ObstacleMinRuntime, free
		}
	}
	return "", 0
}

// prospect is a host as it will be once all that is on its way to its end has left.
type prospect struct {
	*host
	version uint32 // of the host that it follows from
	of      *quarry
	mix     *Mix
	levels  []level
}

// level is what a prospect would have free if all of some priority and lower left too, whatever keeps them.
type level struct {
	priority, end     int // of the quarry's rising ones, the first that is higher
	cpu, memory, disk int64
	room              []deviceRoom
}

// level gives the highest level of at most a priority; nil: nothing there is so low.
func (x *prospect) level(priority int) (top *level) {
	if x.levels == nil {
		x.levels = x.rise()
	}
	for i := range x.levels {
		if x.levels[i].priority > priority {
			break
		}
		top = &x.levels[i]
	}
	return top
}

// free is what is left of the host, without its devices.
func (x *prospect) free() level {
	cpu, memory, disk := x.node.Available()
	return level{cpu: cpu - x.use.CPU, memory: memory - x.use.Memory, disk: disk - x.use.Disk}
}

// rise works out the levels.
func (x *prospect) rise() []level {
	q := x.of
	out := make([]level, 0, 4)
	l, room := x.free(), x.room()
	uses := make([]cluster.DeviceUse, len(room))
	for i, r := range room {
		uses[i] = x.use.Devices[r.id]
	}
	for n, at := range q.rising {
		o := &q.held[at]
		l.priority = o.rank
		l.frees(o, uses)
		if n+1 == len(q.rising) || q.held[q.rising[n+1]].rank > o.rank {
			l.end, l.room = n+1, slices.Clone(room)
			for i := range room {
				l.room[i].is(uses[i])
			}
			out = append(out, l)
		}
	}
	return out
}

// frees counts what an occupant gives free.
func (l *level) frees(o *occupant, uses []cluster.DeviceUse) {
	l.cpu, l.memory, l.disk = l.cpu+o.use.CPU, l.memory+o.use.Memory, l.disk+o.use.Disk
	for _, x := range o.holds {
		u := &uses[x.at]
		u.Whole, u.Shares, u.Milli, u.MiB = u.Whole-x.use.Whole, u.Shares-x.use.Shares, u.Milli-x.use.Milli, u.MiB-x.use.MiB
	}
}

// enough says whether there is as much as a demand asks of each by itself.
func (l *level) enough(d *demand) bool {
	if l.cpu < d.cpu || l.memory < d.memory || l.disk < d.disk {
		return false
	}
	for i := range d.devices {
		ask, n := &d.devices[i], uint64(0)
		for j := range l.room {
			if ask.fits(&l.room[j]) {
				n++
			}
		}
		if n < ask.count {
			return false
		}
	}
	return true
}

// host gives a host as it will be. Where this plan changes nothing, it is the same for all plans of the view.
func (t *trial) host(h *host) *prospect {
	if th := t.hosts[h.index]; th != nil {
		return th
	}
	q, own := t.quarryOf(h), t.apart[h.index]
	if x := h.prospect; !own && x != nil && x.version == h.version && x.of == q && x.mix == t.mix {
		return x
	}
	x := &prospect{host: h.with(t.future(h)), version: h.version, of: q, mix: t.mix}
	if own {
		t.hosts[h.index] = x
	} else {
		h.prospect = x
	}
	return x
}

// lead is a host that may have room for a want, and what that costs at least.
type lead struct {
	*host
	affinity int32
	least    cost
}

// leads are the hosts that may have room, the cheapest first. Looking at one costs less than finding out
// what would have to leave there.
func (t *trial) leads() (out []lead) {
	highest, lowest := t.highest(), t.lowestRanks()
	for i, at := range t.nodes.at {
		if at < 0 {
			continue
		}
		k := &t.nodes.list[at]
		if k.exhausted != "" && lowest[i] > highest && !t.apart[i] {
			continue // it is full, and nothing leaves
		}
		h := k.host
		if t.nodes.outside(h.index) || t.nodes.refusal(h.index, t.onJob.on(h.index), t.onGroup[t.group.name].on(h.index)) != admitted {
			continue
		}
		if least, may := t.least(k); may {
			out = append(out, lead{h, k.affinity, least})
		}
	}
	slices.SortStableFunc(out, func(a, b lead) int { return a.least.compare(b.least) })
	return out
}

// highest is the highest priority of what may be preempted.
func (t *trial) highest() int {
	switch {
	case !t.victims:
		return math.MinInt
	case t.ease >= easePriority:
		return math.MaxInt
	case t.owed:
		return t.job.Priority
	}
	return t.job.Priority - PriorityGap
}

// lowestRanks gives for each host, by its index, the lowest priority of what is there; lower than any where something
// leaves in any case.
func (v *View) lowestRanks() []int {
	if v.lowest == nil {
		v.lowest = make([]int, len(v.hosts))
		for i, h := range v.hosts {
			q := v.quarryOf(h)
			v.movers += len(q.movable)
			switch {
			case q.ending || v.vacated[i]:
				v.lowest[i] = math.MinInt
			case len(q.rising) == 0:
				v.lowest[i] = math.MaxInt
			default:
				v.lowest[i] = q.held[q.rising[0]].rank
			}
		}
	}
	return v.lowest
}

// least says whether a host may have room once all have left that may, and what that costs at least: the most expensive
// that must leave has the lowest priority with which what there is less of comes to enough.
func (t *trial) least(k *candidate) (least cost, may bool) {
	q, d := t.quarryOf(k.host), t.nodes.demand
	if (k.exhausted == "" || q.ending || t.vacated[k.host.index] || t.apart[k.host.index]) && d.exhausted(t.host(k.host).host) == "" {
		return cost{}, true
	}
	th := t.host(k.host)
	top := th.level(t.highest())
	if top == nil || !top.enough(d) {
		return cost{}, false
	}
	room := th.room()
	var l level
	begun := false
	for n := 0; n < top.end; {
		priority, found := q.held[q.rising[n]].rank, false
		for ; n < top.end && q.held[q.rising[n]].rank == priority; n++ {
			o := &q.held[q.rising[n]]
			if !t.within(o) || !t.yields(o) {
				continue
			}
			if !begun {
				begun = true
				l = th.free()
				t.uses = t.uses[:0]
				for _, r := range room {
					t.uses = append(t.uses, th.use.Devices[r.id])
				}
			}
			l.frees(o, t.uses)
			one := cost{priority: priority, owned: 1, lost: o.lost(t.in.Now) * max(o.milli, 1), devices: o.milli, n: 1}
			if t.lends(o) {
				one.owned = 0
			}
			if !found || one.compare(least) < 0 {
				least, found = one, true
			}
		}
		if !found {
			continue
		}
		l.room = append(t.rooms[:0], room...)
		t.rooms = l.room
		for i := range room {
			l.room[i].is(t.uses[i])
		}
		if l.enough(d) {
			return least, true
		}
	}
	return cost{}, false
}

// over says whether an allocation makes room without anything being done: it was preempted
// before, or is of this job and stops.
func (t *trial) over(a *cluster.Allocation) bool {
	return evicted(a) || t.evictions[a.ID] || a.JobKey() == t.in.Eval.JobKey() && (a.ServerTerminal() || t.stopping[a.ID])
}

// within says whether an occupant, whose job is known, is there for this trial to look at.
func (t *trial) within(o *occupant) bool {
	return !o.ended && !t.evictions[o.ID] && !t.gone[o.ID] && !t.stopping[o.ID] && o.JobKey() != t.in.Eval.JobKey()
}

// yields says whether an occupant may be preempted, and notes until when its run time is guaranteed.
func (t *trial) yields(o *occupant) bool {
	if t.updated[o.ID] {
		return false // this plan knows another version of it
	}
	if t.owed && o.policy.Reclaim {
		t.asks(o.Namespace)
	}
	kind, until := t.shield(o, t.owed)
	t.protects(until, o.NodeID)
	return t.ease.overlooks(kind)
}

// protects notes until when a run time on a node is guaranteed, 0 for none.
func (t *trial) protects(until cluster.Time, node string) {
	if until != 0 && (t.protected == 0 || until < t.protected) {
		t.protected, t.protector = until, node
	}
}

// cheapest chooses units that must leave a host for the demand to fit, none of which could
// stay; nil when it does not fit whatever leaves. Two orders are tried: the cheapest first,
// and, within a priority, the largest.
func (t *trial) cheapest(h *host) (best []*unit) {
	if !t.victims {
		return nil
	}
	units := t.prey(h)
	if len(units) == 0 {
		return nil
	}
	inOrder := func(order func(a, b *unit) int) {
		list := slices.Clone(units)
		slices.SortStableFunc(list, order)
		if chosen := t.enough(h, list); chosen != nil && (best == nil || costOf(chosen).compare(costOf(best)) < 0) {
			best = chosen
		}
	}
	inOrder(func(a, b *unit) int { return a.cost().compare(b.cost()) })
	inOrder(func(a, b *unit) int {
		return cmp.Or(cmp.Compare(a.priority, b.priority), cmp.Compare(b.size, a.size), cmp.Compare(a.lost, b.lost))
	})
	return best
}

// enough takes units in their order until the demand fits, and then lets stay whoever can,
// the last first.
func (t *trial) enough(on *host, units []*unit) []*unit {
	h := t.host(on).with(t.host(on).use.Clone())
	fits := func(u *unit, change func(*cluster.Allocation)) bool {
		for _, a := range u.members {
			if a.NodeID == h.node.ID {
				change(a)
			}
		}
		h.roomAt = 0
		return t.nodes.demand.exhausted(h) == ""
	}
	for n, u := range units {
		if !fits(u, h.use.Remove) {
			continue
		}
		chosen := slices.Clone(units[:n+1])
		for i := n - 1; i >= 0; i-- { // the last was needed
			if fits(units[i], h.use.Add) {
				chosen = slices.Delete(chosen, i, i+1)
			} else {
				fits(units[i], h.use.Remove)
			}
		}
		return chosen
	}
	return nil
}

// prey are the units that may be preempted and hold something of the host.
func (t *trial) prey(h *host) (units []*unit) {
	gangs := map[string]bool{}
	held := t.quarryOf(h).held
	for i := range held {
		o := &held[i]
		if o.job == nil || !t.within(o) || o.rank > t.job.Priority && t.ease < easePriority || t.reader.JobVersion(nil, o.JobKey(), o.JobVersion) == nil {
			continue
		}
		members := []*occupant{o}
		if o.gang {
			key := o.Namespace + "\x00" + o.JobID + "\x00" + o.TaskGroup
			if gangs[key] {
				continue
			}
			gangs[key] = true
			members = members[:0]
			for _, m := range t.reader.AllocsByJob(nil, o.JobKey()) {
				if m.TaskGroup == o.TaskGroup && m.JobVersion == o.JobVersion && m.JobCreateIndex == o.JobCreateIndex && !m.Terminal() && !t.evictions[m.ID] && !t.stopping[m.ID] {
					members = append(members, t.occupantOf(m))
				}
			}
		}
		if i := slices.IndexFunc(members, func(o *occupant) bool { return !t.yields(o) }); i < 0 {
			units = append(units, t.unitOf(h, members...))
		} else if members[i].NodeID != h.node.ID {
			t.elsewhere = true
		}
	}
	return units
}

// unitOf weighs members that leave together.
func (t *trial) unitOf(h *host, members ...*occupant) *unit {
	u := &unit{priority: members[0].rank, borrowed: true}
	for _, o := range members {
		u.members = append(u.members, o.Allocation)
		u.borrowed = u.borrowed && t.lends(o)
		u.lost += o.lost(t.in.Now) * max(o.milli, 1)
		u.devices += o.milli
		if o.NodeID == h.node.ID {
			u.size += o.milli
		}
	}
	return u
}
