package agent

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/rxvision/rxvision/agent/gpu"
	"github.com/rxvision/rxvision/agent/task"
	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/proc"
)

// When devices that have failed are tested, to be given to work again.
const (
	// DefaultSelfTestAfter is how long after its fault a device is tested first. Each
	// test that fails doubles the time to the next one, up to maxSelfTestPause.
	DefaultSelfTestAfter = 30 * time.Second
	maxSelfTestPause     = 30 * time.Minute
	// maxSelfTests bounds the tests after one fault; then it is for an operator, or the
	// agent's next start, to try again.
	maxSelfTests = 24
	// checkLimit bounds the operator's own check.
	checkLimit = 10 * time.Minute
	// maxFaults bounds the devices whose faults are kept.
	maxFaults = 256
)

// deviceFaults are the devices that have failed and not passed a self-test since, over
// restarts of the agent: by UUID of GPU or MIG slice, with the reason.
type deviceFaults struct {
	mu     sync.Mutex
	reason map[string]string
	parts  map[string][]string // what tasks hold of a device: itself or its slices
}

// restoreFaults tells the source what an earlier agent found.
func (a *Agent) restoreFaults() error {
	faults, err := a.store.deviceFaults()
	if err != nil {
		return err
	}
	a.faults.reason = faults
	for _, id := range slices.Sorted(maps.Keys(faults)) {
		a.gpus.Fail(id, faults[id])
	}
	return nil
}

// noteFaults keeps the faults of devices before anybody is told of them. What is not there
// now keeps its own: it may come back.
func (a *Agent) noteFaults(inv gpu.Inventory) {
	f := &a.faults
	f.mu.Lock()
	defer f.mu.Unlock()
	next, parts := maps.Clone(f.reason), map[string][]string{}
	if next == nil {
		next = map[string]string{}
	}
	note := func(id string, h gpu.Health) {
		delete(next, id)
		if !h.Healthy && len(next) < maxFaults {
			next[id] = h.Reason
		}
	}
	for _, d := range inv.Devices {
		note(d.UUID, d.Health)
		parts[d.UUID] = []string{d.UUID}
		for _, s := range d.Slices {
			note(s.UUID, s.Health)
			parts[d.UUID], parts[s.UUID] = append(parts[d.UUID], s.UUID), []string{s.UUID}
		}
	}
	f.parts = parts
	if maps.Equal(f.reason, next) {
		return
	}
	if err := a.store.saveDeviceFaults(next); err != nil {
		a.log.Error("the faults of devices could not be stored; the agent's next start forgets them", "error", err)
	}
	f.reason = next
	select {
	case a.faulty <- struct{}{}:
	default:
	}
}

// present gives the faults of the devices that are there.
func (f *deviceFaults) present() map[string][]string {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := map[string][]string{}
	for id := range f.reason {
		if f.parts[id] != nil {
			out[id] = f.parts[id]
		}
	}
	return out
}

// selfTest is the plan for one device.
type selfTest struct {
	at    time.Time
	pause time.Duration
	tries int
}

// testDevices tests devices that have failed, ever less often, and gives those that pass to
// work again.
func (a *Agent) testDevices(ctx context.Context) {
	plans := map[string]*selfTest{}
	for {
		faults := a.faults.present()
		maps.DeleteFunc(plans, func(id string, _ *selfTest) bool { return faults[id] == nil })
		var next time.Time
		for _, id := range slices.Sorted(maps.Keys(faults)) {
			p := plans[id]
			if p == nil {
				p = &selfTest{at: time.Now().Add(a.cfg.SelfTestAfter), pause: a.cfg.SelfTestAfter}
				plans[id] = p
			}
			if p.tries < maxSelfTests && !time.Now().Before(p.at) {
				a.testDevice(ctx, id, faults[id], p)
			}
			if p.tries < maxSelfTests && (next.IsZero() || p.at.Before(next)) {
				next = p.at
			}
		}
		wait := maxSelfTestPause
		if !next.IsZero() {
			wait = time.Until(next)
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-a.faulty:
		case <-ctx.Done():
			timer.Stop()
			return
		}
		timer.Stop()
	}
}

// testDevice tests one device and plans its next test.
func (a *Agent) testDevice(ctx context.Context, id string, parts []string, p *selfTest) {
	if a.holds(parts) { // its work is on the way to its end
		p.at = time.Now().Add(a.cfg.SelfTestAfter)
		return
	}
	err := a.gpus.SelfTest(id)
	if err == nil && len(a.cfg.HealthCheckCommand) > 0 {
		if err = a.checkDevice(ctx, id); err == nil {
			err = a.gpus.SelfTest(id) // the check may have brought errors about
		}
	}
	if ctx.Err() != nil {
		return
	}
	if err == nil {
		a.metrics.selfTests.WithLabelValues("passed").Inc()
		a.log.Info("a device has passed its self-test and is given to work again", "device", id)
		a.gpus.Readmit(id)
		a.refreshNode()
		return
	}
	a.metrics.selfTests.WithLabelValues("failed").Inc()
	p.tries++
	p.pause = min(2*p.pause, maxSelfTestPause)
	p.at = time.Now().Add(p.pause)
	log := a.log.With("device", id, "error", err, "tries", p.tries)
	if p.tries == maxSelfTests {
		log.Error("a device has failed its self-test for good: repair it and restart the agent, or give it back by hand (rxvision node gpu uncordon -force)")
		return
	}
	log.Warn("a device has failed its self-test", "next_in", p.pause)
}

// checkDevice runs the operator's command with the device visible.
func (a *Agent) checkDevice(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, checkLimit)
	defer cancel()
	command := a.cfg.HealthCheckCommand
	_, err := proc.Output(ctx, proc.Spec{Path: command[0], Args: command[1:], Env: []string{
		"PATH=" + os.Getenv("PATH"), "NVIDIA_VISIBLE_DEVICES=" + id, "CUDA_VISIBLE_DEVICES=" + id,
	}})
	return err
}

// holds says whether an allocation that lives here holds one of the devices.
func (a *Agent) holds(ids []string) (held bool) {
	for _, r := range a.begun() {
		r.given().AllocatedResources.Devices(func(id string) bool {
			held = held || slices.Contains(ids, id)
			return !held
		})
	}
	return held
}

// begun lists the runners whose tasks may run.
func (a *Agent) begun() (all []*runner) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(a.runners)) {
		if r := a.runners[id]; r.begun && !r.isDone() {
			all = append(all, r)
		}
	}
	return all
}

// tellTasks puts the fault of a device into the history of the tasks that use it.
func (a *Agent) tellTasks(e gpu.Event) {
	a.faults.mu.Lock()
	parts := a.faults.parts[e.UUID]
	a.faults.mu.Unlock()
	for _, r := range a.begun() {
		alloc := r.given()
		r.update(func() {
			for name, t := range r.local.Tasks {
				for _, id := range task.Devices(alloc, name) {
					if slices.Contains(parts, id) && t.State.State != cluster.TaskStateDead {
						addEvent(t.State, messageEvent(eventDevice, fmt.Sprintf("Device %s is unhealthy: %s", id, e.Reason)))
					}
				}
			}
		})
	}
}
