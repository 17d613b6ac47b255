package agent

import (
	"context"
	"time"

	"github.com/rxvision/rxvision/agent/spot"
	"github.com/rxvision/rxvision/cluster"
)

// spotLimit bounds the question at the start whether the machine is a spot machine.
const spotLimit = 10 * time.Second

// learnSpot finds out whether the node may be taken away, and what an earlier agent knew of that.
func (a *Agent) learnSpot(ctx context.Context) error {
	a.spot = a.cfg.Spot
	if a.cfg.Notices == nil {
		return a.store.saveInterruption(nil)
	}
	ctx, cancel := context.WithTimeout(ctx, spotLimit)
	defer cancel()
	is, err := a.cfg.Notices.Spot(ctx)
	if err != nil {
		a.log.Warn("whether this is a spot machine cannot be learned: it counts as one", "error", err)
	}
	a.spot = a.spot || is || err != nil
	a.interruption, err = a.store.interruption() // true until the provider says otherwise
	return err
}

// watchNotices tells the servers of interruptions.
func (a *Agent) watchNotices(ctx context.Context) {
	a.cfg.Notices.Watch(ctx, func(n *spot.Notice) {
		var is *cluster.Interruption
		if n != nil {
			is = &cluster.Interruption{Reason: n.Reason}
			if !n.At.IsZero() {
				is.At = cluster.TimeOf(n.At)
			}
			a.log.Warn("this node is to be interrupted", "reason", n.Reason, "at", n.At)
		}
		if err := a.store.saveInterruption(is); err != nil {
			a.log.Error("the notice of an interruption could not be stored", "error", err)
		}
		a.mu.Lock()
		a.interruption = is
		a.mu.Unlock()
		a.refreshNode()
	})
}

// addSpot says of the node that, and when, it may be taken away.
func (a *Agent) addSpot(n *cluster.Node) {
	if a.spot {
		n.Attributes[cluster.AttrSpot] = "true"
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	n.Interruption = a.interruption
}
