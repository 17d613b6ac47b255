module github.com/rxvision/rxvision/tools/testreport

go 1.26.0
