//go:build cgo && linux

package gpu

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
)

const (
	// waitSlice is how long one wait for driver events blocks its thread, so how long Watch may take to notice that ctx ended.
	waitSlice = 200 * time.Millisecond
	noSlice   = 0xFFFFFFFF // an event's instance IDs when it is not about a MIG slice
)

// watchedEvents are those that say something about health.
const watchedEvents = nvml.EventTypeXidCriticalError | nvml.EventTypeDoubleBitEccError

// Watch waits for critical errors that the driver reports, and every ProbeEvery asks each GPU whether it still answers. It
// blocks one thread in slices of 200 ms. Where the driver reports no events, only the probing remains.
func (n *nvmlSource) Watch(ctx context.Context, report func(Event)) error {
	if _, err := n.current(); err != nil {
		return fmt.Errorf("watch GPUs: %w", err)
	}
	w := watcher{nvmlSource: n, told: make(map[string]Event), registered: make(map[string]bool)}
	defer w.drop()
	for ctx.Err() == nil {
		if time.Since(w.probed) >= n.opts.ProbeEvery {
			w.probe()
			w.listen()
		}
		w.publish(report)
		w.wait(ctx)
	}
	return nil
}

// watcher is the state of one Watch. Faults go into the source's ledger, from here and from Inventory; publish compares it
// with what was told.
type watcher struct {
	*nvmlSource
	set        nvml.EventSet // nil: not listening
	registered map[string]bool
	probed     time.Time
	told       map[string]Event
}

// publish reports what changed in the ledger.
func (w *watcher) publish(report func(Event)) {
	faults := make(map[string]bool)
	for _, e := range w.ledger.current() {
		faults[e.UUID] = true
		if w.told[e.UUID] != e {
			w.told[e.UUID] = e
			report(e)
		}
	}
	for uuid := range w.told {
		if !faults[uuid] {
			delete(w.told, uuid)
			delete(w.registered, uuid) // a reset may have taken the registration away
			report(Event{UUID: uuid, Health: Health{Healthy: true}})
		}
	}
}

// probe asks every GPU for its memory, which a lost one cannot answer.
func (w *watcher) probe() {
	w.probed = time.Now()
	handles, _ := w.current() // cannot fail after the first time
	for _, h := range handles {
		ask := func() (nvml.Memory, nvml.Return) {
			dev, ret := w.lib.DeviceGetHandleByIndex(h.index) // anew, because a reset makes old handles void
			if ret != nvml.SUCCESS {
				return nvml.Memory{}, ret
			}
			return dev.GetMemoryInfo()
		}
		switch _, ret := get(w.nvmlSource, ask, "nvmlDeviceGetMemoryInfo"); {
		case ret == nvml.SUCCESS:
			w.count(h)
		case silent(ret):
			w.ledger.fail(h.uuid, fault{reason: w.failure(ret).Error(), lost: true})
		}
	}
}

// listen registers the GPUs that are not yet registered for events.
func (w *watcher) listen() {
	if w.set == nil {
		for _, symbol := range []string{"nvmlEventSetWait_v2", "nvmlEventSetFree", "nvmlDeviceRegisterEvents", "nvmlDeviceGetSupportedEventTypes"} {
			if !w.has(symbol) {
				return
			}
		}
		set, ok := maybe(w.nvmlSource, w.lib.EventSetCreate, "nvmlEventSetCreate")
		if !ok {
			return
		}
		w.set = set
	}
	handles, _ := w.current()
	for _, h := range handles {
		if w.registered[h.uuid] {
			continue
		}
		supported, ret := h.dev.GetSupportedEventTypes()
		if ret == nvml.SUCCESS {
			ret = h.dev.RegisterEvents(supported&watchedEvents, w.set)
		}
		w.registered[h.uuid] = !silent(ret) // one that has no events is only probed; a silent one is tried again
	}
}

func (w *watcher) drop() {
	if w.set != nil {
		_ = w.set.Free()
		w.set = nil
		clear(w.registered)
	}
}

// wait blocks for one slice of time or until an event comes, and notes its fault.
func (w *watcher) wait(ctx context.Context) {
	slice := min(waitSlice, w.opts.ProbeEvery)
	if w.set == nil {
		select {
		case <-ctx.Done():
		case <-time.After(slice):
		}
		return
	}
	data, ret := w.set.Wait(uint32(max(slice.Milliseconds(), 1)))
	switch ret {
	case nvml.SUCCESS:
		w.note(data)
	case nvml.ERROR_TIMEOUT:
	default: // a lost GPU ends waiting; the next probe finds which, and then a new set is made
		w.drop()
		w.probe()
	}
}

// note enters the fault of the GPU or slice that an event is about.
func (w *watcher) note(data nvml.EventData) {
	f := fault{reason: "double bit ECC error"}
	if data.EventType == nvml.EventTypeXidCriticalError {
		if w.ignore[data.EventData] {
			return
		}
		f = xidFault(data.EventData)
	}
	uuid, ok := maybe(w.nvmlSource, data.Device.GetUUID, "nvmlDeviceGetUUID")
	isIt := func(h handle) bool { return h.dev == data.Device || ok && h.uuid == uuid }
	handles, _ := w.current()
	all := !slices.ContainsFunc(handles, isIt) // a driver that cannot say which GPU it was leaves none to trust
	for _, h := range handles {
		if all || isIt(h) {
			w.ledger.fail(h.sliceOf(data.GpuInstanceId, data.ComputeInstanceId), f)
		}
	}
}

// sliceOf is the UUID of the MIG slice that an event names, or the GPU's own.
func (h handle) sliceOf(gpu, compute uint32) string {
	if gpu != noSlice && compute != noSlice {
		for _, s := range h.slices {
			if uint32(s.GPU) == gpu && uint32(s.Compute) == compute {
				return s.UUID
			}
		}
	}
	return h.uuid
}
