package agent

import (
	"context"
	"fmt"
	"time"

	"github.com/rxvision/rxvision/agent/gpu"
	"github.com/rxvision/rxvision/cluster"
)

// Waits for device memory that nobody here was given.
const (
	// memoryWait bounds it: what a process that has just ended held is free some seconds later.
	memoryWait = 30 * time.Second
	// memoryLook is the time between two looks.
	memoryLook = 250 * time.Millisecond
)

// driverReserve is what of a device's memory may be in use without a task: the driver's own
// part, in MiB.
func driverReserve(total int64) int64 { return max(1024, total/16) }

// await waits until what the allocation was given is free; false when there is nothing to run.
// What an earlier agent has begun has it.
func (r *runner) await(ctx context.Context) bool {
	r.a.mu.Lock()
	begun := r.begun
	r.a.mu.Unlock()
	return r.awaitRoom(ctx) && (begun || r.awaitMemory(ctx))
}

// awaitMemory waits until the devices that the allocation was given have as much memory free, by
// what NVML says is in use, as it was given; false when they have not in time, and the allocation
// has failed so that it is placed elsewhere. A device that does not tell is taken at the servers' word.
func (r *runner) awaitMemory(ctx context.Context) bool {
	end := time.Now().Add(memoryWait)
	for told := false; ; {
		lack := r.a.memoryLack(r)
		if lack == "" {
			return true
		}
		if !told {
			told = true
			r.log.Warn("allocation waits for device memory", "lack", lack, "at_most", memoryWait)
			r.update(func() {
				for _, t := range r.local.Tasks {
					addEvent(t.State, messageEvent(eventSetup, "Waiting for device memory: "+lack))
				}
			})
		}
		if time.Now().After(end) {
			r.fail("device memory is in use by processes that are none of ours: " + lack)
			return false
		}
		select {
		case <-time.After(memoryLook):
		case <-r.stop: // it is to end: nothing of it shall start
			for _, t := range r.tasks {
				t.requestKill(nil)
			}
			return true
		case <-r.a.suspend.Done():
			return false
		case <-ctx.Done():
			return false
		}
	}
}

// memoryLack says which device has too little memory left for the allocation, "" for none.
func (a *Agent) memoryLack(r *runner) string {
	mine := cluster.NewNodeUse(&cluster.Node{})
	mine.Add(r.given())
	if len(mine.Devices) == 0 {
		return ""
	}
	others := cluster.NewNodeUse(&cluster.Node{})
	for _, o := range a.begun() {
		if o != r {
			others.Add(o.given())
		}
	}
	all, err := a.gpus.Stats()
	if err != nil {
		a.warnOnce("memory in use: " + err.Error())
		return ""
	}
	for _, s := range all {
		use, asked := mine.Devices[s.UUID]
		if asked && s.UsedMiB != nil && s.MemoryMiB != nil {
			if lack := lacks(s, use, others.Devices[s.UUID].MiB); lack != "" {
				return lack
			}
		}
	}
	return ""
}

// lacks compares what is in use of a device with what its allocations were given.
func lacks(s gpu.Stats, use cluster.DeviceUse, held int64) string {
	total := *s.MemoryMiB
	foreign := *s.UsedMiB - held - driverReserve(total)
	wants := use.MiB
	if use.Whole > 0 {
		wants = total
	}
	if left := total - held - foreign; foreign > 0 && left < wants {
		return fmt.Sprintf("device %s has %d MiB in use of which no allocation was given %d; %d MiB are wanted", s.UUID, *s.UsedMiB, foreign, wants)
	}
	return ""
}
