package place

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/rxvision/rxvision/cluster"
)

// Why a Forecast knows no start, where nothing else says it better.
const (
	WhyNothing    = "nothing of the job waits for room"
	WhyNoNode     = "no node that is there can run it"
	WhyUndeclared = "what declares its run time (rx_max_run_duration) leaves too little room when it ends; all else may run for ever"
)

// Forecast says when and where what a job waits for would begin, if all that has declared how long it
// runs (rx_max_run_duration) runs for just as long, all else runs for ever, and nobody else comes.
type Forecast struct {
	// Known is false when nothing can be said; then Why says why, and the rest is empty.
	Known bool
	Why   string
	// Start is the earliest time, not before the Now that was asked with: of a gang and of a job that is placed
	// all at once, when all of it fits; else when the first allocation that is missing does.
	Start  cluster.Time
	Places []Seat
	// Awaits are the IDs of the allocations that must have ended by then, sorted.
	Awaits []string
}

// Seat is a place of a Forecast: one allocation to be.
type Seat struct {
	TaskGroup string
	Name      string // JOB.GROUP[INDEX]
	NodeID    string
	At        cluster.Time                // when there is room for it
	Resources *cluster.AllocatedResources // those that it would be given
	Awaits    []string                    // IDs of allocations on the node that end by Forecast.Start

	host *host
}

// Forecast works out when the job of an input could get what it lacks. It changes nothing, and takes nothing from
// in.NewID; what plans of the view have placed counts as in use.
func (v *View) Forecast(in Input) Forecast {
	v.reserve(in.Now)
	return v.forecast(in)
}

func (v *View) forecast(in Input) Forecast {
	if in.Job == nil || in.Job.Stop || in.Job.Spawns() || in.Job.PerNode() {
		return Forecast{Why: WhyNothing}
	}
	p := v.newPlanner(in)
	p.bind(in)
	p.bindReserves(in, 0) // wherever it begins later, it may run beyond their start
	p.oldDeployment()
	groups := p.reconcile()
	if why := p.mayBegin(); why != "" {
		return Forecast{Why: why}
	}
	f := Forecast{Why: WhyNothing}
	f.Known = in.Job.AllAtOnce
	taken := map[int][]*cluster.Allocation{} // by host, of the groups before
	for _, g := range groups {
		if g.spec == nil || len(g.wants) == 0 {
			continue
		}
		n := 1
		if g.spec.Gang != nil || in.Job.AllAtOnce {
			n = len(g.wants)
		}
		seats, why := p.foresee(g, n, taken)
		switch {
		case seats == nil && in.Job.AllAtOnce:
			return Forecast{Why: why}
		case seats == nil && !f.Known:
			f.Why = why
		case seats == nil:
		case in.Job.AllAtOnce:
			f.Start, f.Places = max(f.Start, latest(seats)), append(f.Places, seats...)
			for _, s := range seats {
				taken[s.host.index] = append(taken[s.host.index], &cluster.Allocation{ID: s.Name, AllocatedResources: s.Resources})
			}
		case !f.Known || latest(seats) < f.Start:
			f.Known, f.Start, f.Places = true, latest(seats), seats
		}
	}
	if len(f.Places) == 0 {
		return Forecast{Why: f.Why}
	}
	f.Why = ""
	for i := range f.Places {
		s := &f.Places[i]
		for _, d := range v.departures(s.host, in.Now) {
			if d.at <= f.Start {
				s.Awaits = append(s.Awaits, d.alloc.ID)
			}
		}
		f.Awaits = append(f.Awaits, s.Awaits...)
	}
	slices.Sort(f.Awaits)
	f.Awaits = slices.Compact(f.Awaits)
	return f
}

func latest(seats []Seat) (at cluster.Time) {
	for _, s := range seats {
		at = max(at, s.At)
	}
	return at
}

// foresee finds the places where n of what a group wants fit first; none, and why, if they never do.
func (p *planner) foresee(g *group, n int, taken map[int][]*cluster.Allocation) (seats []Seat, why string) {
	by := asks(p.job, g.spec)
	by.Add(by.Clone(), int64(n-1))
	if e := p.excess(by); e != nil {
		return nil, "quota " + e.allowance.Quota + " leaves no room"
	}
	nodes := p.newSearch(p.job, g.spec)
	nodes.catchUp()
	if len(nodes.list) == 0 {
		return nil, WhyNoNode
	}
	var all []Seat
	for i := range nodes.list {
		all = append(all, p.seats(&nodes.list[i], nodes, n, taken)...)
	}
	slices.SortFunc(all, func(a, b Seat) int {
		return cmp.Or(
			cmp.Compare(a.At, b.At), cmp.Compare(len(a.Awaits), len(b.Awaits)),
			cmp.Compare(mix(nodes.seed^a.host.hash), mix(nodes.seed^b.host.hash)), cmp.Compare(a.host.index, b.host.index),
		)
	})
	if seats = p.choose(g, nodes, p.together(g, all, n), n); seats == nil {
		return nil, WhyUndeclared
	}
	for i := range seats {
		seats[i].TaskGroup, seats[i].Name, seats[i].Awaits = g.name, g.wants[i].name, nil
	}
	return seats, ""
}

// together leaves of seats in their order those of the domain that has n of them first, if the group is a gang whose
// topology is required.
func (p *planner) together(g *group, all []Seat, n int) []Seat {
	gang := g.spec.Gang
	if gang == nil || !gang.Required || len(gang.Topology) == 0 {
		return all
	}
	of := p.property(gang.Topology[len(gang.Topology)-1])
	seen := make([]int, len(of.values))
	for _, s := range all {
		v := of.of[s.host.index]
		if v < 0 {
			continue
		}
		if seen[v]++; seen[v] == n {
			return slices.DeleteFunc(slices.Clone(all), func(s Seat) bool { return of.of[s.host.index] != v })
		}
	}
	return nil
}

// choose takes the first n seats that the rules about the job's other allocations admit.
func (p *planner) choose(g *group, nodes *search, all []Seat, n int) (chosen []Seat) {
	p.tally()
	for _, s := range all {
		i := s.host.index
		if nodes.refusal(i, p.onJob.on(i), p.onGroup[g.name].on(i)) != admitted {
			continue
		}
		p.count(&cluster.Allocation{NodeID: s.NodeID, TaskGroup: g.name}, 1)
		p.tally()
		if chosen = append(chosen, s); len(chosen) == n {
			return chosen
		}
	}
	return nil
}

// seats are the first n places that come free for the demand on a candidate, each with what must have ended before.
func (p *planner) seats(k *candidate, nodes *search, n int, taken map[int][]*cluster.Allocation) (out []Seat) {
	leaving := p.departures(k.host, p.in.Now)
	if k.exhausted != "" && len(leaving) == 0 {
		return nil
	}
	if nodes.demand.distinctHosts || nodes.demand.distinctInGroup {
		n = 1
	}
	h := k.host.with(p.usage(k.host, ""))
	for _, a := range taken[k.host.index] {
		h.use.Add(a)
	}
	at := p.in.Now
	var gone []string
	rests := p.bound(k.host)
	for len(out) < n {
		if nodes.demand.exhausted(h) == "" {
			r, err := nodes.demand.take(h, fmt.Sprint(p.in.Eval.ID, len(out)), nil)
			if err != nil {
				return out
			}
			h.use.Add(&cluster.Allocation{ID: fmt.Sprint("seat ", len(out)), AllocatedResources: r})
			h.roomAt, h.fragments = 0, fragments{}
			out = append(out, Seat{NodeID: h.node.ID, At: at, Resources: r, Awaits: gone, host: k.host})
			continue
		}
		if len(gone) == len(leaving) {
			return out
		}
		d := leaving[len(gone)]
		at, gone = max(at, d.at), append(gone, d.alloc.ID)
		h.use.Remove(d.alloc)
		for i := range rests { // who has claims takes of what comes free
			r := &rests[i]
			h.use.Remove(r.rest)
			r.rest = p.restOf(r, gone)
			h.use.Add(r.rest)
		}
		h.roomAt, h.fragments = 0, fragments{}
	}
	return out
}

// bound are copies of the claims and reservations on a host that bind.
func (v *View) bound(h *host) (list []standing) {
	for _, s := range v.standings {
		if s.counted && s.host == h {
			list = append(list, *s)
		}
	}
	for _, s := range v.reserves.list {
		if s.counted && s.host == h {
			list = append(list, *s)
		}
	}
	return list
}

// departure is the end of an allocation that is known to come.
type departure struct {
	at    cluster.Time // 0: it has not begun
	takes int64        // from its begin to its end, if that is to come
	alloc *cluster.Allocation
}

// departures are the ends that are known of what is on a host, the earliest first. What was told to end, or
// should have ended, is taken to do so soon; what has not begun, to do so now.
func (v *View) departures(h *host, now cluster.Time) []departure {
	if q := v.quarryOf(h); h.leavingOf != q {
		h.leaving, h.leavingOf = h.leaving[:0], q
		for _, o := range q.held {
			if d, known := v.departure(o.Allocation); known {
				h.leaving = append(h.leaving, d)
			}
		}
	}
	if len(h.leaving) == 0 && len(h.planned) == 0 {
		return nil
	}
	out := slices.Clone(h.leaving)
	for _, a := range h.planned {
		if a.JobID != "" { // else it is the rest of claims
			if d, known := v.departure(a); known {
				out = append(out, d)
			}
		}
	}
	for i := range out {
		d := &out[i]
		if d.at == 0 {
			d.at = now + cluster.Time(d.takes)
		}
		d.at = max(d.at, now)
	}
	slices.SortFunc(out, func(a, b departure) int {
		return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(a.alloc.ID, b.alloc.ID))
	})
	return out
}

// departure is when an allocation will have ended, as far as it has declared that or is told to.
func (v *View) departure(a *cluster.Allocation) (departure, bool) {
	job := v.reader.JobVersion(nil, a.JobKey(), a.JobVersion)
	if job == nil || job.CreateIndex != a.JobCreateIndex {
		return departure{}, false
	}
	g := job.Group(a.TaskGroup)
	switch {
	case g == nil:
		return departure{}, false
	case a.ServerTerminal():
		return departure{takes: int64(g.EndTakes()), alloc: a}, true
	case g.RunTakes() == 0:
		return departure{}, false
	}
	d := departure{takes: int64(g.RunTakes()), alloc: a}
	if began := g.RunBegan(a.Whole().TaskStates); began != 0 {
		d.at = began.Add(g.RunTakes())
	}
	return d, true
}
