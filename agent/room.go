package agent

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// endMargin is what the end of an allocation may take beyond its own delays and kill
// timeouts: what a dead process held of a GPU is free some seconds later.
const endMargin = 5 * time.Second

// awaitRoom waits until nothing that lives on this node uses what the allocation was
// given; false when there is nothing to run: the agent ends, or whoever uses it did
// not end in time, and the allocation has failed so that it is placed elsewhere.
//
// The servers give away what allocations held that they count as lost, or do not know
// any more since they were restored. Here those may still be on their way to their end.
func (r *runner) awaitRoom(ctx context.Context) bool {
	waited := map[*runner]bool{}
	for ctx.Err() == nil && r.a.suspend.Err() == nil {
		other, what := r.a.claim(r)
		if other == nil {
			return true
		}
		if other == r { // it is to end before it began: nothing of it shall start
			for _, t := range r.tasks {
				t.requestKill(nil)
			}
			return true
		}
		limit := other.endsWithin()
		user := fmt.Sprintf("allocation %s of job %s, which still uses %s", other.id, other.given().JobID, what)
		if !waited[other] {
			r.log.Info("allocation waits for the end of another", "other", other.id, "uses", what, "at_most", limit)
			r.update(func() {
				for _, t := range r.local.Tasks {
					addEvent(t.State, messageEvent(eventSetup, "Waiting for the end of "+user))
				}
			})
		}
		waited[other] = true
		timer := time.NewTimer(limit)
		select {
		case <-other.done:
		case <-timer.C:
			r.fail(fmt.Sprintf("waited %s in vain for the end of %s", limit, user))
			return false
		case <-r.stop:
		case <-r.a.suspend.Done():
		case <-ctx.Done():
		}
		timer.Stop()
	}
	return false
}

// claim lets an allocation begin, unless another that lives here uses what it was
// given: then it gives that one and says what it uses. One that is to end is told of
// itself. Devices and ports are used by
// one at a time, whatever the servers think. Processor and memory are the servers' to
// add up; what they do not count any more is added here.
func (a *Agent) claim(r *runner) (other *runner, what string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if r.begun {
		return nil, ""
	}
	select {
	case <-r.stop:
		return r, ""
	default:
	}
	mine := r.given()
	cpu, memory, _ := a.node.Available()
	sum := cluster.NewNodeUse(a.node)
	sum.Add(mine)
	wantsCPU, wantsMemory, wantsDevices := sum.CPU > 0, sum.Memory > 0, len(sum.Devices) > 0
	var overdue *runner // that the servers do not count
	for _, id := range slices.Sorted(maps.Keys(a.runners)) {
		o := a.runners[id]
		if o == r || !o.begun || o.isDone() {
			continue
		}
		theirs := o.given()
		if both := shared(mine, theirs); both != "" {
			return o, both
		}
		sum.Add(theirs)
		o.mu.Lock()
		if overdue == nil && (o.alloc.ClientTerminal() || o.local.Gone) {
			overdue = o
		}
		o.mu.Unlock()
	}
	switch {
	case overdue == nil:
	case wantsMemory && sum.Memory > memory:
		return overdue, "memory"
	case wantsCPU && sum.CPU > cpu:
		return overdue, "cpu"
	case wantsDevices && sum.DeviceFault() != "":
		return overdue, sum.DeviceFault()
	}
	r.begun = true
	return nil, ""
}

// given is the allocation as the servers sent it last.
func (r *runner) given() *cluster.Allocation {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.alloc
}

// shared names a device or port that both allocations were given, "" for none. Shares
// of one device may be in several hands.
func shared(a, b *cluster.Allocation) string {
	if a.AllocatedResources == nil {
		return ""
	}
	theirs, both := cluster.NewNodeUse(&cluster.Node{}), cluster.NewNodeUse(&cluster.Node{})
	theirs.Add(b)
	both.Add(a)
	both.Add(b)
	for id, use := range both.Devices {
		if use.Conflict() != "" {
			return "device " + id
		}
	}
	for _, p := range a.AllocatedResources.Shared.Ports {
		if theirs.Port(p.Value) {
			return fmt.Sprintf("port %d", p.Value)
		}
	}
	return ""
}

// endsWithin bounds how long the allocation takes to end once it is told to.
func (r *runner) endsWithin() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	limit := endMargin
	g := r.group()
	if g == nil {
		return limit
	}
	if g.ShutdownDelay != nil {
		limit += *g.ShutdownDelay
	}
	if r.preempted() {
		limit += g.PreemptGrace()
	}
	for _, t := range g.Tasks {
		limit += t.ShutdownDelay + routeWait + killGrace(t)
	}
	return limit
}
