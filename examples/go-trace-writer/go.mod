module tracewriter

go 1.19
