package raftstore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/raft"

	"github.com/rxvision/rxvision/cluster"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// seal ends a log entry with its CRC-32C, because neither raft nor bbolt would
// notice a changed byte.
func seal(entry []byte) []byte {
	return binary.BigEndian.AppendUint32(entry, crc32.Checksum(entry, castagnoli))
}

// unseal checks and takes off what seal put on.
func unseal(sealed []byte) ([]byte, error) {
	n := len(sealed) - crc32.Size
	if n < 1 {
		return nil, fmt.Errorf("log entry of %d bytes is cut short", len(sealed))
	}
	if got, want := crc32.Checksum(sealed[:n], castagnoli), binary.BigEndian.Uint32(sealed[n:]); got != want {
		return nil, fmt.Errorf("log entry is damaged on disk: checksum %08x, recorded %08x", got, want)
	}
	return sealed[:n], nil
}

// outcome is what applying an entry gave.
type outcome struct {
	cluster.Result
	err error // the entry could not be applied at all; the store has failed
}

// fsm is the shell between raft and the state: Apply, Snapshot and Restore are
// called by raft's goroutine, one at a time.
type fsm struct {
	tmp       string // folder for snapshot files on their way
	createdBy string
	metrics   *metrics
	fail      func(error)
	closing   <-chan struct{}
	running   atomic.Bool // false while raft starts: an error of Restore ends Open then
	current   atomic.Pointer[cluster.State]
	due       chan struct{} // a snapshot is, because of the bytes applied
	sized     chan int      // the size of the last snapshot, when it has changed
	news      news

	mu         sync.Mutex // held while the state and the fields below change
	index      uint64     // of the last command applied, or above it after a restore
	term       uint64
	members    uint64 // index of the newest Raft configuration
	barrier    uint64 // everything up to there is applied, entries that never come here included
	bytes      int    // applied since the last snapshot
	size       int    // of the last snapshot
	failure    error
	restoreErr error
	waiters    []*waiter
}

func newFSM(tmp, createdBy string, m *metrics, fail func(error), closing <-chan struct{}) *fsm {
	f := &fsm{tmp: tmp, createdBy: createdBy, metrics: m, fail: fail, closing: closing, due: make(chan struct{}, 1), sized: make(chan int, 1)}
	f.current.Store(cluster.NewState())
	return f
}

// Apply implements raft.FSM; it gives an outcome.
func (f *fsm) Apply(l *raft.Log) any { return f.ApplyBatch([]*raft.Log{l})[0] }

// ApplyBatch implements raft.BatchingFSM: it gives an outcome for each command. Readers of
// the state see all of a batch or nothing. After an entry that cannot be understood nothing
// is applied any more, else this server would hold another state than its peers.
func (f *fsm) ApplyBatch(logs []*raft.Log) []any {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]any, len(logs))
	var entries []cluster.Entry
	var damage error // of the entry behind entries
	for _, l := range logs {
		switch l.Type {
		case raft.LogConfiguration:
			f.members = max(f.members, l.Index)
		case raft.LogCommand:
			if damage == nil {
				var data []byte
				if data, damage = unseal(l.Data); damage != nil {
					damage = fmt.Errorf("log index %d: %w", l.Index, damage)
					continue
				}
				entries = append(entries, cluster.Entry{Index: l.Index, Data: data})
			}
		}
	}
	var results []cluster.Result
	if f.failure == nil {
		var err error
		results, err = f.current.Load().ApplyBatch(entries)
		if err == nil {
			err = damage
		}
		if err != nil {
			f.failure = fmt.Errorf("apply %w", err)
			f.fail(f.failure)
		}
	}
	for i, l := range logs {
		switch {
		case l.Type != raft.LogCommand:
		case len(results) == 0:
			out[i] = outcome{err: f.failure}
		default:
			out[i] = outcome{Result: results[0]}
			results = results[1:]
			f.bytes += len(l.Data)
			f.index, f.term = max(f.index, l.Index), l.Term
		}
	}
	f.wake()
	f.news.tell()
	if f.bytes >= f.enough() {
		select {
		case f.due <- struct{}{}:
		default:
		}
	}
	return out
}

// StoreConfiguration implements raft.ConfigurationStore. Raft keeps the members;
// here it is noted which entry set them, which raft tells nobody.
func (f *fsm) StoreConfiguration(index uint64, _ raft.Configuration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.members = max(f.members, index)
	f.wake()
}

func (f *fsm) membersIndex() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.members
}

// waiter waits for an index.
type waiter struct {
	index uint64
	seen  bool          // entries of raft's own count, too
	done  chan struct{} // closed when it is there
}

// moved sets the index and wakes those who wait for it.
func (f *fsm) moved(index, term uint64) {
	f.index, f.term = max(f.index, index), term
	f.wake()
}

// wake wakes those whose index is there. The caller holds mu.
func (f *fsm) wake() {
	f.waiters = slices.DeleteFunc(f.waiters, func(w *waiter) bool {
		if !f.there(w) {
			return false
		}
		close(w.done)
		return true
	})
}

func (f *fsm) there(w *waiter) bool {
	return f.index >= w.index || w.seen && max(f.members, f.barrier) >= w.index
}

// sawBarrier notes that everything up to index is applied.
func (f *fsm) sawBarrier(index uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.barrier = max(f.barrier, index)
	f.wake()
}

// view is a consistent view of the state and where in the log it stands.
func (f *fsm) view() (snap *cluster.Snapshot, index, term uint64, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.current.Load().Snapshot(), f.index, f.term, f.failure
}

func (f *fsm) snapshotDue() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.bytes >= f.enough()
}

// wrote notes how large the last snapshot is.
func (f *fsm) wrote(size int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.resized(size)
}

// resized is wrote for a caller who holds mu.
func (f *fsm) resized(size int) {
	f.size = size
	select {
	case <-f.sized: // nobody has heard of the one before
	default:
	}
	f.sized <- size
}

// enough is how many bytes of entries make a snapshot due: as many as the last one
// has. A large state is not written anew for a small part of it, and reading the log
// again takes no longer than reading the snapshot. The caller holds mu.
func (f *fsm) enough() int { return max(snapshotBytes, f.size) }

func (f *fsm) appliedIndex() uint64 {
	index, _ := f.applied()
	return index
}

// applied is the last command applied and its term.
func (f *fsm) applied() (index, term uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.index, f.term
}

// wait returns when the command at index is applied, or with an error when ctx
// ends or one of the channels is closed.
func (f *fsm) wait(ctx context.Context, index uint64, failed, closing <-chan struct{}) error {
	return f.waitFor(ctx, &waiter{index: index}, failed, closing)
}

// waitSeen is wait for an index that may be one of raft's own entries.
func (f *fsm) waitSeen(ctx context.Context, index uint64, failed, closing <-chan struct{}) error {
	return f.waitFor(ctx, &waiter{index: index, seen: true}, failed, closing)
}

func (f *fsm) waitFor(ctx context.Context, w *waiter, failed, closing <-chan struct{}) (err error) {
	f.mu.Lock()
	if f.there(w) {
		f.mu.Unlock()
		return nil
	}
	w.done = make(chan struct{})
	f.waiters = append(f.waiters, w)
	f.mu.Unlock()
	select {
	case <-w.done:
		return nil
	case <-ctx.Done():
		err = ctx.Err()
	case <-failed:
		err = errors.New("the store has failed")
	case <-closing:
		err = errClosing
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.waiters = slices.DeleteFunc(f.waiters, func(x *waiter) bool { return x == w })
	return err
}

// Snapshot implements raft.FSM: it takes the view that Persist writes later,
// beside further Applies.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	f.mu.Lock()
	f.bytes = 0
	f.mu.Unlock()
	snap, index, term, err := f.view()
	if err != nil {
		return nil, err // a state that has stopped must not replace the log
	}
	return &persister{fsm: f, snap: snap, head: snapshotHead{Index: index, Term: term, CreatedBy: f.createdBy}}, nil
}

// Restore implements raft.FSM: the snapshot file replaces the state, whole or
// not at all.
func (f *fsm) Restore(source io.ReadCloser) error {
	state, head, members, size, err := restoreSource(source)
	f.mu.Lock()
	defer f.mu.Unlock()
	if err != nil {
		err = fmt.Errorf("restore snapshot: %w", err)
		f.restoreErr = err
		if !f.running.Load() {
			return err // raft tries an older one, and the log from there
		}
		// Raft holds the snapshot for installed and would panic on an error. The state
		// is the old one still; nothing may be applied to it any more.
		f.failure = err
		f.fail(err)
		return nil
	}
	old := f.current.Swap(state)
	f.bytes, f.members = 0, max(f.members, members)
	f.resized(size)
	f.moved(head.Index, head.Term)
	old.Abandon()
	return nil
}

// stop wakes those who watch the last state.
func (f *fsm) stop() { f.current.Load().Abandon() }
