package swarm

import (
	"math"
	"sync/atomic"
	"time"
)

// histogram counts durations in buckets that grow by an eighth each, from 100 µs to
// some minutes: quantiles are true to about 6 %.
type histogram struct {
	buckets [128]atomic.Int64
}

const (
	leastBucket = 100 * time.Microsecond
	growth      = 1.125
)

func (h *histogram) add(d time.Duration) {
	i := int(math.Log(max(float64(d)/float64(leastBucket), 1)) / math.Log(growth))
	h.buckets[min(i, len(h.buckets)-1)].Add(1)
}

// quantile is the middle of the bucket that holds it, 0 when nothing was counted.
func (h *histogram) quantile(q float64) time.Duration {
	var total int64
	for i := range h.buckets {
		total += h.buckets[i].Load()
	}
	left := int64(math.Ceil(q * float64(total)))
	for i := range h.buckets {
		if left -= h.buckets[i].Load(); left <= 0 && total > 0 {
			return time.Duration(float64(leastBucket) * math.Pow(growth, float64(i)+0.5))
		}
	}
	return 0
}
