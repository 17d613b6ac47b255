package gpu

import (
	"context"
	"slices"
	"sync"
)

// Fake is a Source that answers what a test tells it. Make one with NewFake.
type Fake struct {
	mu     sync.Mutex
	inv    Inventory
	stats  []Stats
	ledger ledger
	events chan struct{} // one pending wake-up of Watch
	queue  []Event
	tests  map[string]error // answers of SelfTest; nil: passed
	tested int
}

// NewFake returns a source with these GPUs. All are healthy until Fail.
func NewFake(inv Inventory) *Fake {
	return &Fake{inv: inv, events: make(chan struct{}, 1)}
}

// SetInventory replaces the GPUs.
func (f *Fake) SetInventory(inv Inventory) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.inv = inv
}

// SetStats replaces what Stats answers.
func (f *Fake) SetStats(s ...Stats) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stats = s
}

// XID injects an error of a device or slice, as the driver would report it.
func (f *Fake) XID(uuid string, xid uint64) {
	if !slices.Contains(appXIDs, xid) {
		f.note(f.ledger.fail(uuid, xidFault(xid)))
	}
}

// Fail enters a fault.
func (f *Fake) Fail(uuid, reason string) { f.note(f.ledger.fail(uuid, fault{reason: reason})) }

// SetSelfTest sets what the self-test of a device answers; until then it passes.
func (f *Fake) SetSelfTest(uuid string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.tests == nil {
		f.tests = make(map[string]error)
	}
	f.tests[uuid] = err
}

// SelfTest answers what the test set.
func (f *Fake) SelfTest(uuid string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tested++
	return f.tests[uuid]
}

// SelfTests counts the calls of SelfTest.
func (f *Fake) SelfTests() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.tested
}

// Readmit makes a device or slice healthy again.
func (f *Fake) Readmit(uuid string) { f.note(f.ledger.heal(uuid)) }

func (f *Fake) note(e Event, ok bool) {
	if !ok {
		return
	}
	f.mu.Lock()
	f.queue = append(f.queue, e)
	f.mu.Unlock()
	select {
	case f.events <- struct{}{}:
	default:
	}
}

// Inventory answers what the test set, with the health that follows from XID, Fail and Readmit.
func (f *Fake) Inventory() (Inventory, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	inv := f.inv
	inv.Devices = slices.Clone(inv.Devices)
	for i := range inv.Devices {
		d := &inv.Devices[i]
		d.Health = f.ledger.health(d.UUID)
		d.Slices = slices.Clone(d.Slices)
		for j := range d.Slices {
			d.Slices[j].Health = f.ledger.health(d.Slices[j].UUID)
		}
	}
	return inv, nil
}

// Stats answers what the test set.
func (f *Fake) Stats() ([]Stats, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.stats), nil
}

// Watch reports what XID, Fail and Readmit change.
func (f *Fake) Watch(ctx context.Context, report func(Event)) error {
	f.mu.Lock()
	f.queue = f.ledger.current() // changes up to here are in it
	f.mu.Unlock()
	for {
		f.mu.Lock()
		queue := f.queue
		f.queue = nil
		f.mu.Unlock()
		for _, e := range queue {
			report(e)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-f.events:
		}
	}
}

// Close does nothing.
func (f *Fake) Close() error { return nil }
