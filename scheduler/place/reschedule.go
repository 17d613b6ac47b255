package place

import (
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// nextReschedule says when a failed allocation may be replaced; false: never.
func nextReschedule(p *cluster.ReschedulePolicy, a *cluster.Allocation) (cluster.Time, bool) {
	if p == nil || (!p.Unlimited && p.Attempts <= 0) {
		return 0, false
	}
	at := failedAt(a)
	if !p.Unlimited {
		attempts := 0
		for _, e := range events(a) {
			if p.Interval <= 0 || cluster.Time(e.RescheduleTime).Add(p.Interval) > at {
				attempts++
			}
		}
		// The tracker keeps the newest events only; a full one that lies within the
		// interval says no more than that attempts reached its bound.
		if attempts >= min(p.Attempts, cluster.MaxRescheduleEvents) {
			return 0, false
		}
	}
	return at.Add(nextDelay(p, a)), true
}

// failedAt is when the last task of an allocation ended.
func failedAt(a *cluster.Allocation) cluster.Time {
	var at cluster.Time
	for _, s := range a.Whole().TaskStates {
		if s != nil {
			at = max(at, s.FinishedAt)
		}
	}
	if at == 0 {
		at = cluster.Time(a.ModifyTime)
	}
	return at
}

func events(a *cluster.Allocation) []*cluster.RescheduleEvent {
	if a.RescheduleTracker == nil {
		return nil
	}
	return a.RescheduleTracker.Events
}

// nextDelay is how long after its failure an allocation is replaced. It grows
// from one replacement to the next by the policy's function up to MaxDelay, and
// begins anew when the allocation has outlived the delay it came with.
func nextDelay(p *cluster.ReschedulePolicy, a *cluster.Allocation) time.Duration {
	if p == nil {
		return 0
	}
	es := events(a)
	if len(es) == 0 || p.DelayFunction == "constant" || p.DelayFunction == "" {
		return p.Delay
	}
	last := es[len(es)-1]
	delay := 2 * last.Delay
	if p.DelayFunction == "fibonacci" {
		delay = p.Delay // the sequence begins with the delay twice
		if len(es) > 1 {
			if before := es[len(es)-2]; before.Delay <= last.Delay { // not just begun anew
				delay = before.Delay + last.Delay
			}
		}
	}
	if p.MaxDelay > 0 {
		delay = min(delay, p.MaxDelay)
	}
	if failedAt(a) > cluster.Time(last.RescheduleTime).Add(delay) {
		return p.Delay
	}
	return max(delay, p.Delay)
}

// track adds a replacement to the tracker that the new allocation inherits.
func track(prev *cluster.Allocation, e *cluster.RescheduleEvent, now cluster.Time) *cluster.RescheduleTracker {
	if e == nil {
		return prev.RescheduleTracker
	}
	added := *e
	added.RescheduleTime = int64(now)
	es := append(append([]*cluster.RescheduleEvent(nil), events(prev)...), &added)
	if len(es) > cluster.MaxRescheduleEvents {
		es = es[len(es)-cluster.MaxRescheduleEvents:]
	}
	return &cluster.RescheduleTracker{Events: es, LastReschedule: "ok"}
}
