package sim

import (
	"time"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/scheduler"
)

// What a leader does, and how often.
const (
	planEvery    = 10 * time.Millisecond
	planTakes    = 40 * time.Millisecond // at most, from a batch's snapshot to its proposal
	watchEvery   = 200 * time.Millisecond
	sweepEvery   = nodeTTL / 4
	collectEvery = 15 * time.Second
	ownTries     = 1000 // of a leader's own commands: they end with the reign

	holdNodes = 3 // silent ones that may be too many
	holdShare = 30
	holdLimit = time.Minute
)

// retention is short, so that much is collected while a run lasts. It must stay
// far above the time a server may lag behind.
var retention = scheduler.Retention{
	EvalGCThreshold: time.Minute, BatchEvalGCThreshold: time.Minute, DeploymentGCThreshold: time.Minute,
	JobGCThreshold: 2 * time.Minute,
}

// reign is a leader's work: scheduling, liveness of nodes, collection. All that
// it knows it takes from the state; it ends with the leadership.
type reign struct {
	s     *server
	w     *world
	over  bool
	steps *scheduler.Steps
	since int64
	heard map[string]int64 // when any server last heard of a node, by node ID
	busy  map[string]bool  // parts whose last commands are still under way
	plans int              // batches under way
	seen  uint64           // index up to which there is nothing to plan
	next  cluster.Time     // but for what falls due then
}

func newReign(s *server) *reign {
	r := &reign{
		s: s, w: s.w, steps: scheduler.NewSteps(retention, s.w.newID),
		since: s.w.now, heard: map[string]int64{}, busy: map[string]bool{},
	}
	s.w.note("%s has caught up and schedules from %d", s, s.applied)
	r.every(planEvery, r.plan)
	r.every(watchEvery, r.watch)
	r.every(sweepEvery, r.sweep)
	r.every(collectEvery, r.collect)
	return r
}

func (r *reign) end() { r.over = true }

func (r *reign) after(d time.Duration, do func()) {
	r.s.after(d, func() {
		if !r.over {
			do()
		}
	})
}

func (r *reign) every(d time.Duration, do func()) {
	r.after(d, func() { do(); r.every(d, do) })
}

func (r *reign) propose(cmd cluster.Command, done func(cluster.Result, error)) {
	to := func() *server {
		if r.over {
			return nil
		}
		return r.s
	}
	r.w.propose(r.s.addr, cmd, ownTries, to, func(res cluster.Result, err error) {
		if !r.over && done != nil {
			done(res, err)
		}
	})
}

// commit proposes commands of one part of the work; the part rests until all are answered.
func (r *reign) commit(part string, cmds []cluster.Command) {
	left := len(cmds)
	r.busy[part] = left > 0
	for _, c := range cmds {
		r.propose(c, func(cluster.Result, error) {
			if left--; left == 0 {
				r.busy[part] = false
			}
		})
	}
}

// plan lets the workers plan, each on the state as it is now; some time later,
// when others may have changed it, they propose what they planned.
func (r *reign) plan() {
	if r.seen == r.s.applied && (r.next == 0 || r.s.clock() < r.next) {
		return
	}
	for r.plans < r.w.weather.workers {
		var b *scheduler.Batch
		if b, r.next = r.steps.Plan(r.s.state.Snapshot(), r.s.clock(), 1+r.w.rnd.IntN(8)); b == nil {
			r.seen = r.s.applied
			return
		}
		r.plans++
		r.after(r.w.upTo(planTakes), func() {
			r.propose(b.Command(), func(res cluster.Result, err error) {
				r.plans--
				r.seen = 0
				for _, c := range b.Settle(res, err, r.s.clock()) {
					r.propose(c, nil)
				}
			})
		})
	}
}

func (r *reign) watch() {
	if !r.busy["watch"] {
		r.commit("watch", r.steps.Watch(r.s.state.Snapshot(), r.s.clock()))
	}
}

func (r *reign) collect() {
	if !r.busy["collect"] {
		r.commit("collect", r.steps.Collect(r.s.state.Snapshot(), r.s.clock()))
	}
}

// sweep marks nodes down that no server has heard of for a TTL. A fresh leader
// gives all of them one TTL. When many fall silent at once, replacements pause.
func (r *reign) sweep() {
	if r.busy["sweep"] {
		return
	}
	snap := r.s.state.Snapshot()
	hold, cmd := snap.FleetHold(nil), &cluster.UpdateNodeStatus{}
	var there, fresh, silent int // nodes that are not down; of them, silent now, and all that are
	for _, n := range snap.Nodes(nil, "") {
		u := cluster.NodeStatusUpdate{NodeID: n.ID, Index: n.ModifyIndex, Status: cluster.NodeStatusDown, Message: "Node heartbeat missed"}
		switch quiet := r.w.now-max(r.since, r.heard[n.ID]) > int64(nodeTTL); {
		case n.Status == cluster.NodeStatusDown:
			continue
		case quiet && n.Status == cluster.NodeStatusDisconnected:
			if hold == nil && !snap.Awaited(n, r.s.clock()) {
				cmd.Updates = append(cmd.Updates, u)
			}
			silent++
		case quiet:
			if hold != nil {
				u.Status = cluster.NodeStatusDisconnected
			}
			cmd.Updates = append(cmd.Updates, u)
			silent++
			fresh++
		}
		there++
	}
	many := func(n int) bool { return n >= holdNodes && 100*n > holdShare*there }
	switch {
	case hold == nil && many(fresh):
		r.commit("sweep", []cluster.Command{&cluster.SetFleetHold{Hold: &cluster.FleetHold{Nodes: silent, Of: there, Reason: "many nodes fell silent at once"}}})
		return // nobody goes down before the hold is stored
	case hold != nil && (!many(silent) || r.s.clock() > hold.Since.Add(holdLimit)):
		r.commit("sweep", []cluster.Command{&cluster.SetFleetHold{}})
		return
	}
	if len(cmd.Updates) > 0 {
		r.commit("sweep", []cluster.Command{cmd})
	}
}
