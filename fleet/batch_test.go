package fleet

import (
	"context"
	"log/slog"
	"strings"
	"testing"

	"github.com/rxvision/rxvision/cluster"
)

// sizedStore notes how large the entries are that it is given.
type sizedStore struct {
	Store
	largest, allocs int
}

func (s *sizedStore) Apply(_ context.Context, cmd cluster.Command) (cluster.Result, error) {
	s.largest = max(s.largest, len(cluster.EncodeCommand(cmd)))
	s.allocs += len(cmd.(*cluster.UpdateAllocs).Allocs)
	return cluster.Result{}, nil
}

// TestStatusFitsTheLog gives the batcher more status at once than a log entry
// takes: all of it must be stored, and every report answered.
func TestStatusFitsTheLog(t *testing.T) {
	const entry, reported, each = 1 << 20, 8, 64
	store := &sizedStore{Store: &memStore{state: cluster.NewState()}}
	var reports []report
	answered := 0
	for range reported {
		r := report{ctx: t.Context(), done: func(err error) {
			if err != nil {
				t.Error(err)
			}
			answered++
		}}
		for range each {
			r.allocs = append(r.allocs, &cluster.Allocation{ID: "a", ClientDescription: strings.Repeat("x", 4<<10)})
		}
		reports = append(reports, r)
	}
	newBatcher(store, slog.New(slog.DiscardHandler)).commit(t.Context(), reports)
	if answered != reported || store.allocs != reported*each {
		t.Errorf("%d of %d reports were answered, %d of %d allocations stored", answered, reported, store.allocs, reported*each)
	}
	if store.largest > entry {
		t.Errorf("an entry of %d bytes is more than the log takes", store.largest)
	}
}
