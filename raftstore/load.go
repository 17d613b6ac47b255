package raftstore

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/rxvision/rxvision/cluster"
)

// loader builds a state from records: whoever finds them adds them, some goroutines
// decode them, one puts them into the state in their order, and another one writes them
// to a snapshot file, if that is wanted. So a large state takes as long as the slowest of them.
type loader struct {
	group   *errgroup.Group
	ctx     context.Context // ends with the first error
	cancel  context.CancelFunc
	file    *snapshotWriter // nil: none
	batch   *records        // being filled
	decode  chan *records
	order   chan *records // the same ones
	write   chan *records
	state   *cluster.State
	stopped bool
}

// records are some records on their way through a loader.
type records struct {
	bytes   []byte
	list    []record
	decoded chan error // of the row behind the last
	rows    []cluster.Row
}

type record struct {
	table *cluster.Table
	end   int // in bytes
}

const (
	loadBatch = 256 << 10 // bytes of records
	loadQueue = 4         // batches between two goroutines
	decoders  = 3
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

var batches = sync.Pool{New: func() any { return &records{decoded: make(chan error, 1)} }}

// newLoader begins; finish or stop must follow. The file, if any, is closed by them.
func newLoader(file *snapshotWriter) *loader {
	l := &loader{
		file: file, batch: batches.Get().(*records),
		decode: make(chan *records, loadQueue), order: make(chan *records, loadQueue+decoders), write: make(chan *records, loadQueue),
	}
	ctx, cancel := context.WithCancel(context.Background())
	l.cancel = cancel
	l.group, l.ctx = errgroup.WithContext(ctx)
	for range decoders {
		l.group.Go(l.decodeAll)
	}
	l.group.Go(l.putAll)
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
	if !l.pass(b) {
		return l.stop()
	}
	return nil
}

// pass gives a batch to the decoders and to the one who waits for what they make of it.
func (l *loader) pass(b *records) bool { return l.send(l.order, b) && l.send(l.decode, b) }

func (l *loader) send(to chan<- *records, b *records) bool {
	select {
	case to <- b:
		return true
	case <-l.ctx.Done():
		return false
	}
}

func (l *loader) decodeAll() error {
	reader := cluster.NewReader()
	for b := range l.decode {
		b.decoded <- b.read(reader)
	}
	return nil
}

func (b *records) read(reader *cluster.Reader) error {
	begin := 0
	for _, r := range b.list {
		row, err := reader.Read(r.table, b.bytes[begin:r.end])
		if err != nil {
			return err
		}
		b.rows = append(b.rows, row)
		begin = r.end
	}
	return nil
}

func (l *loader) putAll() error {
	defer close(l.write)
	restore := cluster.NewRestore()
	before := 0
	for b := range l.order {
		select {
		case err := <-b.decoded:
			if err != nil {
				return &recordError{before + len(b.rows) + 1, err}
			}
		case <-l.ctx.Done():
			return l.ctx.Err()
		}
		before += len(b.rows)
		for _, row := range b.rows {
			restore.Put(row)
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
	clear(b.rows)
	b.bytes, b.list, b.rows = b.bytes[:0], b.list[:0], b.rows[:0]
	batches.Put(b)
}

func (l *loader) writeAll() error {
	for b := range l.write {
		begin := 0
		for i, r := range b.list {
			if err := l.file.put(r.table, b.rows[i].Key, b.bytes[begin:r.end]); err != nil {
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
	if !l.pass(l.batch) {
		return nil, l.stop()
	}
	l.stopped = true
	close(l.decode)
	close(l.order)
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
	close(l.order)
	err := l.group.Wait()
	if l.file != nil {
		err = errors.Join(err, l.file.abort())
	}
	if !failed {
		return nil
	}
	return err
}
