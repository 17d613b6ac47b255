package raftstore

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
)

// BenchmarkRegisterJob is the rate of acknowledged (fsynced) job registrations of
// one server, by the store of the log and the number of clients at work.
func BenchmarkRegisterJob(b *testing.B) {
	for _, kind := range []string{LogBbolt, LogWAL} {
		for _, clients := range []int{1, 8, 32} {
			b.Run(fmt.Sprintf("%s/clients=%d", kind, clients), func(b *testing.B) {
				benchmarkRegister(b, clients, mustOpen(b, b.TempDir(), quiet, func(c *Config) { c.LogStore = kind }))
			})
		}
	}
}

func benchmarkRegister(b *testing.B, clients int, s *Store) {
	var next atomic.Int64
	var group sync.WaitGroup
	b.ResetTimer()
	for range clients {
		group.Go(func() {
			for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
				if _, err := s.Apply(b.Context(), register(fmt.Sprintf("job-%d", i))); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	group.Wait()
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "applies/s")
}

func quiet(c *Config) { c.Logger = slog.New(slog.DiscardHandler) }

// BenchmarkTenThousandJobs times what an operator waits for with that many jobs.
func BenchmarkTenThousandJobs(b *testing.B) {
	const jobs = 10_000
	dir := b.TempDir()
	s := mustOpen(b, dir, quiet)
	var group sync.WaitGroup
	for w := range 32 {
		group.Go(func() {
			for i := w; i < jobs; i += 32 {
				if _, err := s.Apply(b.Context(), register(fmt.Sprintf("job-%d", i))); err != nil {
					b.Error(err)
				}
			}
		})
	}
	group.Wait()
	var archive bytes.Buffer
	b.Run("save", func(b *testing.B) {
		for b.Loop() {
			archive.Reset()
			a, err := s.SaveArchive(b.Context())
			if err != nil {
				b.Fatal(err)
			}
			if _, err := io.Copy(&archive, a); err != nil {
				b.Fatal(err)
			}
			if err := a.Close(); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(archive.Len())/1e6, "MB")
	})
	b.Run("restore", func(b *testing.B) {
		for b.Loop() {
			if _, err := s.RestoreArchive(b.Context(), bytes.NewReader(archive.Bytes())); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("restart", func(b *testing.B) {
		for b.Loop() {
			mustClose(b, s)
			s = mustOpen(b, dir, quiet)
		}
	})
}
