package raftstore

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/rxvision/rxvision/cluster"
)

// loader builds a state from records: whoever finds them adds them, a goroutine
// decodes them, and another one writes them to a snapshot file, if that is
// wanted. So a large state takes as long as the slowest of the three.
type loader struct {
	group   *errgroup.Group
	ctx     context.Context // ends with the first error
	cancel  context.CancelFunc
	file    *snapshotWriter // nil: none
	batch   *records        // being filled
	decode  chan *records
	write   chan *records
	state   *cluster.State
	stopped bool
}

// records are some records on their way through a loader.
type records struct {
	bytes []byte
	list  []record
}

type record struct {
	table *cluster.Table
	key   string
	end   int // in bytes
}

const (
	loadBatch = 256 << 10 // bytes of records
	loadQueue = 4         // batches between two goroutines
)

// recordError is a record that cannot be decoded.
type recordError struct {
	number int // from 1
	cause  error
}

// Error implements error.
func (e *recordError) Error() string { return e.cause.Error() }

// Unwrap gives the cause.
func (e *recordError) Unwrap() error { return e.cause }

// errUnfit says that each record is good but that they make no whole state.
var errUnfit = errors.New("state")

var batches = sync.Pool{New: func() any { return new(records) }}

// newLoader begins; finish or stop must follow. The file, if any, is closed by them.
func newLoader(file *snapshotWriter) *loader {
	l := &loader{file: file, batch: batches.Get().(*records), decode: make(chan *records, loadQueue), write: make(chan *records, loadQueue)}
	ctx, cancel := context.WithCancel(context.Background())
	l.cancel = cancel
	l.group, l.ctx = errgroup.WithContext(ctx)
	l.group.Go(l.decodeAll)
	if file != nil {
		l.group.Go(l.writeAll)
	}
	return l
}

// add takes a copy of one record. Its error says only that there is one; stop or
// finish has it.
func (l *loader) add(t *cluster.Table, value []byte) error {
	b := l.batch
	b.bytes = append(b.bytes, value...)
	b.list = append(b.list, record{table: t, end: len(b.bytes)})
	if len(b.bytes) < loadBatch {
		return nil
	}
	l.batch = batches.Get().(*records)
	if !l.send(l.decode, b) {
		return l.stop()
	}
	return nil
}

func (l *loader) send(to chan<- *records, b *records) bool {
	select {
	case to <- b:
		return true
	case <-l.ctx.Done():
		return false
	}
}

func (l *loader) decodeAll() error {
	defer close(l.write)
	restore := cluster.NewRestore()
	number := 0
	for b := range l.decode {
		begin := 0
		for i := range b.list {
			r := &b.list[i]
			number++
			var err error
			if r.key, err = restore.Put(r.table, b.bytes[begin:r.end]); err != nil {
				return &recordError{number, err}
			}
			begin = r.end
		}
		if l.file == nil {
			b.recycle()
		} else if !l.send(l.write, b) {
			return l.ctx.Err()
		}
	}
	if l.ctx.Err() != nil {
		return l.ctx.Err()
	}
	var err error
	if l.state, err = restore.Done(); err != nil {
		return fmt.Errorf("%w: %w", errUnfit, err)
	}
	return nil
}

func (b *records) recycle() {
	b.bytes, b.list = b.bytes[:0], b.list[:0]
	batches.Put(b)
}

func (l *loader) writeAll() error {
	for b := range l.write {
		begin := 0
		for _, r := range b.list {
			value := make([]byte, r.end-begin, r.end-begin+4) // the checksum goes behind it; the file keeps it for a while
			copy(value, b.bytes[begin:r.end])
			if err := l.file.put(r.table, r.key, value); err != nil {
				return err
			}
			begin = r.end
		}
		b.recycle()
	}
	return l.ctx.Err()
}

// finish gives the state of all records; the file is whole then.
func (l *loader) finish(head snapshotHead) (*cluster.State, error) {
	if !l.send(l.decode, l.batch) {
		return nil, l.stop()
	}
	l.stopped = true
	close(l.decode)
	err := l.group.Wait()
	l.cancel()
	switch {
	case err != nil && l.file != nil:
		return nil, errors.Join(err, l.file.abort())
	case err != nil:
		return nil, err
	case l.file != nil:
		err = l.file.finish(head)
	}
	return l.state, err
}

// stop ends it without a state and gives the first error that there was, if any.
func (l *loader) stop() error {
	if l.stopped {
		return nil
	}
	l.stopped = true
	failed := l.ctx.Err() != nil
	l.cancel()
	close(l.decode)
	err := l.group.Wait()
	if l.file != nil {
		err = errors.Join(err, l.file.abort())
	}
	if !failed {
		return nil
	}
	return err
}
