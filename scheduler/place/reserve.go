package place

import (
	"fmt"
	"math"
	"slices"

	"github.com/rxvision/rxvision/cluster"
)

// maxReservations is how many of the evaluations that wait for room get a reservation in each node pool, the first in
// line first; reserveLook bounds how many are looked at to find them.
const (
	maxReservations = 8
	reserveLook     = 256
)

// reserves are the reservations that a view knows: what waits for room will take it at a time that follows from what
// others have declared (see Forecast), and who comes after it may only use it until then. They are worked out anew for
// each view, from the state alone, and only if any job declares a run time.
type reserves struct {
	known bool           // they have been worked out
	off   bool           // no job declares a run time
	pools map[string]int // evaluations that were looked at for one, by node pool
	list  []*standing
}

// reserve works out the reservations, the first time that it is called.
func (v *View) reserve(now cluster.Time) {
	r := &v.reserves
	if r.known {
		return
	}
	r.known, r.off = true, !v.reader.RunLimited()
	if r.off {
		return
	}
	r.pools = map[string]int{}
	looked := 0
	v.reader.EvalsShortOfRoom(func(e *cluster.Evaluation) bool {
		v.reserveFor(Input{Job: v.reader.Job(nil, e.JobKey()), Eval: e, Now: now})
		looked++
		return looked < reserveLook
	})
}

// reserveFor makes a reservation for a job, if it is known when it could begin, and that is not at once.
func (v *View) reserveFor(in Input) {
	if in.Job == nil {
		return
	}
	pool := nodePool(in.Job.NodePool)
	if v.reserves.pools[pool] >= maxReservations {
		return
	}
	v.reserves.pools[pool]++
	f := v.forecast(in)
	if !f.Known || len(f.Awaits) == 0 {
		return
	}
	s := standing{job: in.Eval.JobKey(), priority: in.Eval.Priority, index: placeInLine(in.Eval), from: f.Start}
	for i, seat := range f.Places {
		s.host = seat.host
		v.reserves.list = join(v.reserves.list, s, &cluster.Claim{
			AllocID: fmt.Sprint(in.Eval.ID, " ", i), Name: seat.Name, NodeID: seat.NodeID, Resources: seat.Resources, Awaits: seat.Awaits,
		})
	}
}

// placeInLine orders evaluations of one priority; one that is not in the state comes last.
func placeInLine(e *cluster.Evaluation) uint64 {
	if e.CreateIndex == 0 {
		return math.MaxUint64
	}
	return e.CreateIndex
}

// runsUntil is when all of what is placed for an input now will have ended, 0 when that is not declared.
func runsUntil(in Input) (until cluster.Time) {
	if in.Job == nil {
		return 0
	}
	for _, g := range in.Job.TaskGroups {
		if g.RunTakes() == 0 {
			return 0
		}
		until = max(until, in.Now.Add(g.RunTakes()))
	}
	return until
}

// bindReserves counts the reservations that an evaluation has to keep off: those of other jobs before it, unless what
// it places has ended by the time that they begin.
func (v *View) bindReserves(in Input, until cluster.Time) {
	for _, s := range v.reserves.list {
		before := s.priority > in.Eval.Priority || s.priority == in.Eval.Priority && s.index < placeInLine(in.Eval)
		v.countClaims(s, s.job != in.Eval.JobKey() && before && (until == 0 || until > s.from))
	}
}

// reserveNext brings the job's reservation up to date when its plan is made: who has got all that he wants needs none.
func (p *planner) reserveNext() {
	r, key := &p.reserves, p.in.Eval.JobKey()
	if r.off {
		return
	}
	mine := func(s *standing) bool { return s.job == key }
	lacks := len(p.result.Failed) > 0 && p.quota == "" && len(p.claims) == 0
	if lacks && p.result.Empty() && slices.ContainsFunc(r.list, mine) {
		return
	}
	r.list = slices.DeleteFunc(r.list, func(s *standing) bool {
		if mine(s) {
			p.countClaims(s, false)
		}
		return mine(s)
	})
	if lacks {
		p.reserveFor(Input{Job: p.job, Eval: p.in.Eval, Now: p.in.Now})
	}
}
