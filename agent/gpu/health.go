package gpu

import (
	"fmt"
	"slices"
	"sync"
)

// appXIDs are errors that an application causes, or that only inform, and that leave the GPU usable. Meanings by NVIDIA's
// XID catalogue (docs.nvidia.com/deploy/xid-errors); its k8s-device-plugin passes over 13, 31, 43, 45, 68 and 109 too. All
// other errors make a GPU unhealthy: one too many costs a self-test, one too few costs jobs.
var appXIDs = []uint64{
	13,  // graphics engine exception
	31,  // GPU memory page fault
	43,  // GPU stopped processing
	45,  // preemptive clean-up after earlier errors
	68,  // video processor exception
	69,  // graphics engine class error
	109, // context switch timeout
	137, // NVLink access without the privilege, by an application
	154, // the recommended recovery action has changed: the self-test reads it
}

// xidText says in words what the more frequent of the other errors mean.
var xidText = map[uint64]string{
	48:  "double bit ECC error",
	62:  "internal micro-controller halt",
	63:  "memory row remapping or page retirement",
	64:  "failed row remapping or page retirement",
	74:  "NVLink error",
	79:  "GPU has fallen off the bus",
	92:  "high rate of single bit ECC errors",
	94:  "contained memory error",
	95:  "uncontained memory error",
	119: "GPU system processor does not answer",
	120: "GPU system processor error",
	140: "unrecovered ECC error",
	142: "NVENC3 error",
	143: "GPU initialisation failure",
	149: "fatal NVLink error",
	999: "unknown error",
}

// fault is why a device is unhealthy.
type fault struct {
	reason string
	xid    uint64
	lost   bool // it does not answer
}

// ledger keeps the faults of devices and slices by UUID. Safe for several goroutines.
type ledger struct {
	mu     sync.Mutex
	faults map[string]fault
}

// health of one UUID.
func (l *ledger) health(uuid string) Health {
	l.mu.Lock()
	defer l.mu.Unlock()
	if f, bad := l.faults[uuid]; bad {
		return Health{Reason: f.reason}
	}
	return Health{Healthy: true}
}

// fail notes a fault and returns the event to report; ok is false when the device was unhealthy already. An error proper
// replaces mere silence, because it says more.
func (l *ledger) fail(uuid string, f fault) (e Event, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if old, bad := l.faults[uuid]; bad && (!old.lost || f.lost) {
		return Event{}, false
	}
	if l.faults == nil {
		l.faults = make(map[string]fault)
	}
	l.faults[uuid] = f
	return f.event(uuid), true
}

// heal clears any fault.
func (l *ledger) heal(uuid string) (e Event, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, bad := l.faults[uuid]
	delete(l.faults, uuid)
	return Event{UUID: uuid, Health: Health{Healthy: true}}, bad
}

// current lists the faults as events, by UUID.
func (l *ledger) current() []Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []Event
	for uuid, f := range l.faults {
		all = append(all, f.event(uuid))
	}
	slices.SortFunc(all, func(a, b Event) int {
		if a.UUID < b.UUID {
			return -1
		}
		return 1
	})
	return all
}

func (f fault) event(uuid string) Event {
	return Event{UUID: uuid, Health: Health{Reason: f.reason}, XID: f.xid}
}

func xidFault(xid uint64) fault {
	text := xidText[xid]
	if text == "" {
		text = "see NVIDIA's XID catalogue"
	}
	return fault{reason: fmt.Sprintf("XID %d: %s", xid, text), xid: xid}
}
